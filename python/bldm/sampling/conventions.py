"""Conventions: how a code base does Bernoulli diffusion, as one small object made of named pieces."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import bldm_kernels as bk

from .call import Call, Caller
from .guidance import Guidance
from .hooks import Hook
from .outputs import READS, Output, Read
from .rules import FINALS, RULES
from .states import FORMS, LAYOUTS
from .time_labels import TIME_LABELS, TimeLabel
from .timesteps import SPACINGS, Spacing


@dataclass(frozen=True)
class Conventions:
    """What a sampler has to know about a denoiser's code base besides its schedule. Defaults: this library's own.

    prediction: what the logits are of: "flip" (x_0 != x_t) or "x_0".
    output: how to read logits from the answer: "logits", "probabilities", "two-class", or a function (outputs.py).
    output_at: instead of both, where they change with time: t -> `Output`.
    rule, final: reverse rule and that of the last step, see `step_table` (rules.py); `final=None`: the same.
    time_label: "t" (1..T), "t-1", or a function t -> number (time_labels.py).
    state, state_dtype: "packed" (uint8), "bits" (0, 1) or "signs" (-1, 1), of float32 or another dtype.
    layout: "channels-last", "channels-first" or "flat" (states.py).
    call: which argument goes where (call.py).
    spacing: which timesteps S steps visit (timesteps.py).
    guidance: one batched call or two, and what the scale means (guidance.py).
    hook: what happens to P(x_0 = 1) between denoiser and step (hooks.py).
    """

    prediction: str = "flip"
    output: str | Read = "logits"
    output_at: Callable[[int], Output] | None = None
    rule: str = "plugin"
    final: str | None = "threshold"
    time_label: str | TimeLabel = "t"
    state: str = "packed"
    state_dtype: torch.dtype = torch.float32
    layout: str = "channels-last"
    call: Call | Caller = Call()
    spacing: str | Spacing = "reference"
    guidance: Guidance = Guidance()
    hook: Hook | None = None

    def __post_init__(self) -> None:
        bk.checks.option("prediction", self.prediction, ("flip", "x_0"))
        bk.checks.option("rule", self.rule, RULES)
        if self.final is not None:
            bk.checks.option("final", self.final, FINALS)
        bk.checks.option("state", self.state, FORMS)
        bk.checks.option("layout", self.layout, LAYOUTS)
        for name, choices in (("output", READS), ("time_label", TIME_LABELS), ("spacing", SPACINGS)):
            value = getattr(self, name)
            if not callable(value):
                bk.checks.option(name, value, choices)
        if not callable(self.call):
            raise TypeError(f"call: expected a Call or a function, got {type(self.call).__name__}")
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"guidance: expected a Guidance, got {type(self.guidance).__name__}")
        if self.state == "packed" and self.layout != "channels-last":
            raise ValueError(f"layout: {self.layout!r} needs unpacked bits, but state is 'packed'")
        if self.state == "packed" and self.state_dtype != torch.float32:
            raise ValueError(f"state_dtype: {self.state_dtype} needs unpacked bits, but state is 'packed'")
        if self.output_at is not None and (self.output != "logits" or self.prediction != "flip"):
            raise ValueError("output_at: it says both prediction and output, expected neither besides it")
        if self.hook is not None and self.rule == "threshold-renoise":
            raise ValueError("hook: expected None under the rule 'threshold-renoise', which decides by logits alone")

    def replace(self, **pieces: Any) -> "Conventions":
        """The same with other pieces. Raises TypeError for a name that is none."""
        unknown = sorted(set(pieces) - set(self.__dataclass_fields__))
        if unknown:
            raise TypeError(f"{unknown[0]}: unknown option, expected one of {', '.join(self.__dataclass_fields__)}")
        return replace(self, **pieces)

    def output_of(self, t: int) -> Output:
        """Prediction and reading at timestep t."""
        if self.output_at is not None:
            return self.output_at(t)
        return Output(self.prediction, self.output if callable(self.output) else READS[self.output])

    def label(self) -> TimeLabel:
        return self.time_label if callable(self.time_label) else TIME_LABELS[self.time_label]

    def spaced(self, num_timesteps: int, num_steps: int) -> list[int]:
        return (self.spacing if callable(self.spacing) else SPACINGS[self.spacing])(num_timesteps, num_steps)
