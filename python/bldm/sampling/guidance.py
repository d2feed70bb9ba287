"""Classifier-free guidance: l = l_u + s (l_c - l_u) on raw logits (Ho & Salimans 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import bldm_kernels as bk


@dataclass(frozen=True)
class Guidance:
    """How the two halves are computed and what the scale means.

    Args:
        calls: 1, both halves in one batched call of the denoiser, or 2, one call each (where the unconditional one has another
            number of tokens, or its condition is None).
        convention: "s", plain conditional at 1, or "g" = s - 1, plain conditional at 0 (the paper's code).
    """

    calls: int = 1
    convention: str = "s"

    def __post_init__(self) -> None:
        bk.checks.integer("guidance: calls", self.calls, 1, 2)
        bk.checks.option("guidance: convention", self.convention, ("s", "g"))

    @property
    def neutral(self) -> float:
        """The scale that means no guidance."""
        return 1.0 if self.convention == "s" else 0.0

    def table(self, scale: float | Sequence[float] | Tensor | None, num_steps: int) -> list[float]:
        """s of every step, from one scale for all or one a step."""
        if scale is None:
            return [1.0] * num_steps
        if isinstance(scale, Tensor):
            scale = scale.tolist()
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * num_steps
        if len(scales) != num_steps:
            raise ValueError(f"guidance_scale: expected one number, or one a step ({num_steps}), got {len(scales)}")
        return [bk.checks.real("guidance_scale", value) + 1.0 - self.neutral for value in scales]
