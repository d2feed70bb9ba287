"""The operators of the Bernoulli diffusion: the reverse step, its probability, the noise and the loss (see `_ops.py`)."""

import math
from typing import Any

import torch
from torch import Tensor

from ._ops import RANDOM, define, library
from .canonical import as_rows, broadcast_samples, coefficient_rows, result_dtype, without_padding
from .dispatch import select


# --- a step, and noise -----------------------------------------------------------------------------------------------
def _run_flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    temperature: float,
    x0_prediction: bool,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    guidance_tensor: Tensor | None,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
    nonfinite: Tensor | None,
    *,
    out: Tensor,
) -> None:
    if not out.numel():
        return
    kernel = select("flip_step", out.device, logits.dtype)
    kernel(
        as_rows(logits),
        as_rows(x_t),
        coefficient_rows(coefficients),
        seed,
        step,
        sample_offset,
        seed_tensor,
        step_tensor,
        offset_tensor,
        temperature,
        x0_prediction,
        None if uncond_logits is None else as_rows(uncond_logits),
        guidance_scale,
        guidance_tensor,
        without_padding(broadcast_samples(keep_mask, x_t), logits.shape[-1]),  # so that padding stays 0
        broadcast_samples(keep_bits, x_t),
        nonfinite,
        as_rows(out),
    )


_STEP_ARGUMENTS = (
    f"Tensor logits, Tensor x_t, Tensor coefficients, {RANDOM}, Tensor? offset_tensor, float temperature, "
    "bool x0_prediction, Tensor? uncond_logits, float guidance_scale, Tensor? guidance_tensor, Tensor? keep_mask, "
    "Tensor? keep_bits"
)
# The counter of non-finite logits is written too, so both forms of the op say so in their schema.
library.define(f"flip_step({_STEP_ARGUMENTS}, Tensor(b!)? nonfinite) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    f"flip_step_out({_STEP_ARGUMENTS}, Tensor(b!)? nonfinite, *, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _flip_step(logits: Tensor, x_t: Tensor, *args: Any) -> Tensor:
    out = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    _run_flip_step(logits, x_t, *args, out=out)
    return out


library.impl("flip_step", _flip_step, "CompositeExplicitAutograd")
library.impl("flip_step_out", _run_flip_step, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bldm::flip_step",
    lambda logits, x_t, *args: torch.empty_like(x_t, memory_format=torch.contiguous_format),
    lib=library,
)
torch.library.register_fake("bldm::flip_step_out", lambda *args, out: None, lib=library)


def _allocate_flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=result_dtype(logits))


def _run_flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool, out: Tensor
) -> None:
    if out.numel():
        kernel = select("flip_probability", out.device, logits.dtype)
        kernel(as_rows(logits), as_rows(x_t), coefficient_rows(coefficients), temperature, x0_prediction, as_rows(out))


_PROBABILITY_ARGUMENTS = "Tensor logits, Tensor x_t, Tensor coefficients, float temperature, bool x0_prediction"
run_flip_probability = define(
    "flip_probability", _PROBABILITY_ARGUMENTS, _run_flip_probability, _allocate_flip_probability, out=False
)


def _run_flip_probability_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    temperature: float,
    x0_prediction: bool,
    out: Tensor,
) -> None:
    if out.numel():
        kernel = select("flip_probability_backward", out.device, logits.dtype)
        rows = coefficient_rows(coefficients)
        kernel(as_rows(grad), as_rows(logits), as_rows(x_t), rows, temperature, x0_prediction, as_rows(out))


def _allocate_like_logits(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


run_flip_probability_backward = define(
    "flip_probability_backward",
    f"Tensor grad, {_PROBABILITY_ARGUMENTS}",
    _run_flip_probability_backward,
    _allocate_like_logits,
    out=False,
)


def _run_add_noise(
    x_0: Tensor,
    flip_probability: Tensor,
    num_bits: int,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    if out.numel():
        kernel = select("add_noise", out.device)
        probability = flip_probability.contiguous().view(-1)
        kernel(as_rows(x_0), probability, num_bits, seed, step, sample_offset, seed_tensor, step_tensor, as_rows(out))


define(
    "add_noise",
    f"Tensor x_0, Tensor flip_probability, SymInt num_bits, {RANDOM}",
    _run_add_noise,
    lambda x_0, *args: torch.empty_like(x_0, memory_format=torch.contiguous_format),
    out=True,
)


# --- the loss --------------------------------------------------------------------------------------------------------
_LOSS_INPUTS = "Tensor logits, Tensor x_0, Tensor x_t, Tensor? weight"


def _loss_factor(logits: Tensor, reduction: str) -> float:
    """The loss is this times the sum over the bits: of a sample, or of all."""
    if reduction == "sum":
        return 1.0
    return (len(logits) if reduction == "sample" else 1) / logits.numel()


def _run_flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    reduction: str,
    loss: Tensor,
    set_fraction: Tensor,
) -> None:
    if not logits.numel():
        loss.fill_(math.nan if reduction == "mean" and not len(logits) else 0.0)
        set_fraction.zero_()
        return
    kernel = select("flip_loss", loss.device, logits.dtype)
    rows = (as_rows(logits), as_rows(x_0), as_rows(x_t))
    weight = None if weight is None else weight.to(loss.dtype).contiguous()
    fraction = set_fraction if balanced else None
    kernel(*rows, weight, focal_gamma, x0_prediction, _loss_factor(logits, reduction), loss, fraction)


def _allocate_flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and the fraction of set targets of every sample, which the backward of the balanced form needs."""
    batch, dtype = logits.shape[0], result_dtype(logits)
    loss = logits.new_empty((batch,) if reduction == "sample" else (), dtype=dtype)
    return loss, logits.new_empty((batch if balanced else 0,), dtype=dtype)


run_flip_loss = define(
    "flip_loss",
    f"{_LOSS_INPUTS}, float focal_gamma, bool balanced, bool x0_prediction, str reduction",
    _run_flip_loss,
    _allocate_flip_loss,
    out=False,
)


def _run_flip_loss_backward(
    grad: Tensor,
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    set_fraction: Tensor,
    focal_gamma: float,
    x0_prediction: bool,
    reduction: str,
    out: Tensor,
) -> None:
    """`grad` belongs to the loss, one element or (B,); `set_fraction` is what `flip_loss` returned, (B,) or empty."""
    if out.numel():
        kernel = select("flip_loss_backward", out.device, logits.dtype)
        dtype = result_dtype(logits)
        rows = (as_rows(logits), as_rows(x_0), as_rows(x_t))
        weight = None if weight is None else weight.to(dtype).contiguous()
        fraction = set_fraction if set_fraction.numel() else None
        options = (focal_gamma, x0_prediction, _loss_factor(logits, reduction))
        kernel(grad.to(dtype).contiguous(), *rows, weight, fraction, *options, as_rows(out))


run_flip_loss_backward = define(
    "flip_loss_backward",
    f"Tensor grad, {_LOSS_INPUTS}, Tensor set_fraction, float focal_gamma, bool x0_prediction, str reduction",
    _run_flip_loss_backward,
    _allocate_like_logits,
    out=False,
)
