"""Hooks on the predicted x_0: what some samplers do to the probabilities between the denoiser and the step.

A hook keeps its state in named buffers that belong to the sampling loop, so that a captured loop is replayed with new values:
`buffers` allocates them for a batch, `begin` fills them before a run, and the call changes x_0's probabilities at every step.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

import bldm_kernels as bk

Buffers = dict[str, Tensor]


class Hook(Protocol):
    """Tensors are (B, *latent_shape) float32."""

    def buffers(self, like: Tensor) -> Buffers:
        """State and inputs for a batch shaped like `like`."""

    def begin(self, buffers: Buffers, inputs: Mapping[str, Tensor]) -> None:
        """Fill the buffers in place before a run, from the `hook_inputs` of the call."""

    def __call__(self, said: Tensor, x_0: Tensor, buffers: Buffers, last: bool) -> Tensor:
        """The probabilities to use instead of `x_0`, P(x_0 = 1); `said` is what the model said, in its own prediction."""


class Denoised:
    """A plain function of P(x_0 = 1) (guided diffusion's `denoised_fn`)."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def buffers(self, like: Tensor) -> Buffers:
        return {}

    def begin(self, buffers: Buffers, inputs: Mapping[str, Tensor]) -> None:
        pass

    def __call__(self, said: Tensor, x_0: Tensor, buffers: Buffers, last: bool) -> Tensor:
        return self.function(x_0)


class StickyMask:
    """Bits may change only where the model once found them unlikely.

    mask |= said > threshold;  x_0' = x_0 mask + original (1 - mask)

    The last step neither grows nor applies the mask (as in the anomaly detection of Wolleb et al. 2023). Inputs: "original"
    and "mask" (B, *latent_shape), "threshold" one element. The mask is left in the buffer "mask".
    """

    def buffers(self, like: Tensor) -> Buffers:
        names = ("original", "mask")
        return {name: torch.zeros_like(like) for name in names} | {"threshold": like.new_zeros(1)}

    def begin(self, buffers: Buffers, inputs: Mapping[str, Tensor]) -> None:
        if set(inputs) != set(buffers):
            raise ValueError(f"hook_inputs: expected {', '.join(sorted(buffers))}, got {', '.join(sorted(inputs)) or 'none'}")
        for name, buffer in buffers.items():
            bk.checks.shape(f"hook_inputs: {name}", inputs[name], buffer.shape)
            buffer.copy_(inputs[name])

    def __call__(self, said: Tensor, x_0: Tensor, buffers: Buffers, last: bool) -> Tensor:
        if last:
            return x_0
        mask = torch.where(said > buffers["threshold"], 1.0, buffers["mask"])
        buffers["mask"].copy_(mask)
        return x_0 * mask + buffers["original"] * (1 - mask)
