"""Denoisers that make whole steps themselves, such as the engines of `optimize`: logits then never reach memory."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .call import Call
from .conventions import Conventions
from .execution import Execution


class Steps(Protocol):
    """The steps of one batch."""

    def logits(self, i: int, x_t: Tensor) -> Tensor:
        """Logits (rows, ..., C) of step i; packed x_t of rows samples, or of half of them: both halves then share it."""

    def flip(
        self,
        i: int,
        x_t: Tensor,
        coefficients: Tensor,
        *,
        seed: Tensor,
        sample_offset: Tensor,
        temperature: float,
        prediction: str,
        guidance_scale: Tensor | None,
        keep_mask: Tensor | None,
        keep_bits: Tensor | None,
        nonfinite: Tensor,
    ) -> Tensor:
        """`bk.flip_step` of step i's logits; with a guidance_scale, of the first half and, as uncond_logits, the second."""


@runtime_checkable
class StepDenoiser(Protocol):
    """A denoiser of packed bits that the loop lets make the steps."""

    def begin(self, times: Tensor, label: Tensor | None, rows: int) -> Steps:
        """The steps at `times` int64 (S,), the same for all rows, with the rows' conditions `label`."""


def step_denoiser(conventions: Conventions, execution: Execution, guided: bool, cond: Any) -> StepDenoiser | None:
    """The denoiser, if it makes steps and the conventions are those it makes them under."""
    denoiser = execution.original
    ours = conventions.state == "packed" and conventions.call == Call()
    whole = not execution.compiled and (not guided or conventions.guidance.calls == 1)
    single = cond is None or isinstance(cond, Tensor)
    return denoiser if isinstance(denoiser, StepDenoiser) and ours and whole and single else None
