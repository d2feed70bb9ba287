"""The last layer of a step: final LayerNorm, product to logits, and the flip of the bits, so that logits need no memory.

The norm is folded into the product: with g and s its weight and bias, W and b the head's,

    LN(h) @ W^T + b = (h @ (W g)^T - mean(h) rowsum(W g)) / std(h) + (W @ s + b)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..canonical import broadcast_samples, coefficient_rows, num_bytes
from ..ops.diffusion import PREDICTIONS, check_coefficients, check_kept, check_nonfinite, flip_step
from .choice import triton_runs_on


class Head(NamedTuple):
    """A head with the final norm folded in: weight (C, W) in the dtype of h; sums and bias float32 (C,); the norm's eps."""

    weight: Tensor
    sums: Tensor
    bias: Tensor
    eps: float


def fold_head(
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.bfloat16,
) -> Head:
    """The head of `LayerNorm(norm_weight, norm_bias, eps)` (W,) and `Linear(weight, bias)` (C, W), (C,), computed in float64.

    `sums` are those of the rounded weights, so that the mean of a row cancels exactly.
    """
    scaled = (weight.double() * norm_weight.double()).to(dtype)
    shift = weight.double() @ norm_bias.double() + bias.double()
    return Head(scaled.contiguous(), scaled.double().sum(-1).float(), shift.float(), eps)


def plain(h: Tensor, head: Head) -> Tensor:
    """The specification of the logits: (B, N, W) -> (B, N, C), in float64 for float64 h, else float32."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    x = h.to(dtype)
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) - mean.square() + head.eps)
    return (x @ head.weight.to(dtype).T - mean * head.sums.to(dtype)) * rstd + head.bias.to(dtype)


def supports(h: Tensor, head: Head) -> bool:
    """Whether the kernel takes these: h and the weight of the head in bfloat16."""
    same = h.dtype == head.weight.dtype == torch.bfloat16
    return same and h.numel() > 0 and len(head.weight) > 0 and triton_runs_on(h.device)


def head_logits(h: Tensor, head: Head, num_positions: int, *, pdl: bool = False) -> Tensor:
    """Logits of the first N tokens of every sample: what `head_step` decides on.

    Args:
        h: contiguous (B, T, W), T >= N, bfloat16 for the kernel.
        head: see `fold_head`.
        num_positions: N.
        pdl: as in `attention`.

    Returns: float32 (B, N, C).
    """
    _check(h, head, num_positions)
    if supports(h, head) and num_positions > 0:
        from .triton import head as kernels

        out = h.new_empty(len(h), num_positions, len(head.weight), dtype=torch.float32)
        kernels.logits(h, *head, num_positions, pdl, out)
        return out
    return plain(h[:, :num_positions], head).float()


def head_step(
    h: Tensor,
    head: Head,
    x_t: Tensor,
    coefficients: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_offset: int | Tensor = 0,
    temperature: float = 1.0,
    prediction: str = "flip",
    guidance_scale: float | Tensor | None = None,
    keep_mask: Tensor | None = None,
    keep_bits: Tensor | None = None,
    nonfinite: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """`bk.flip_step` of the float32 logits of `head_logits`, which never reach memory: the same random stream and decisions.

    Args:
        h: contiguous (B, T, W), bfloat16 for the kernel. With guidance (2 B, T, W): the samples with their condition, then the
            same samples without.
        head: see `fold_head`.
        x_t: uint8 (B, N, ceil(C / 8)), N <= T.
        guidance_scale: s of l = l_u + s (l_c - l_u), a number or a one-element float32 tensor; None: no guidance.
        nonfinite: int32 tensor of one element to which the number of non-finite logits is added; without it they are not
            looked for, whatever the device.
        pdl: as in `attention`.
        others: as in `bk.flip_step`.

    Returns: packed x_s, uint8 like x_t.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.packed("x_t", x_t)
    if x_t.dim() != 3:
        raise ValueError(f"x_t: expected (B, N, P), got shape {tuple(x_t.shape)}")
    samples, positions = x_t.shape[:2]
    _check(h, head, positions)
    halves = 1 if guidance_scale is None else 2
    if len(h) != halves * samples:
        raise ValueError(f"h: expected {halves} x {samples} samples for x_t {tuple(x_t.shape)}, got shape {tuple(h.shape)}")
    if supports(h, head) and x_t.numel() > 0:
        from .triton import head as kernels

        checks.shape("x_t", x_t, (samples, positions, num_bytes(len(head.weight))), "the packed bits of the head's channels")
        check_coefficients(coefficients, "h", h[:samples])
        checks.option("prediction", prediction, PREDICTIONS)
        check_kept(keep_mask, keep_bits, x_t)
        check_nonfinite(nonfinite, "h", h)
        checks.out(out, x_t.shape, torch.uint8, "x_t", x_t)
        seed_value, seed_tensor = checks.seed(seed, "h", h)
        step_value, step_tensor = checks.step(step, "h", h)
        offset_value, offset_tensor = checks.sample_offset_or_tensor(sample_offset, "h", h)
        guidance_value, guidance_tensor = checks.guidance_scale(1.0 if guidance_scale is None else guidance_scale, "h", h)
        out = torch.empty_like(x_t, memory_format=torch.contiguous_format) if out is None else out
        kernels.step(
            h,
            *head,
            x_t.contiguous(),
            coefficient_rows(coefficients),
            seed_value,
            step_value,
            offset_value,
            seed_tensor,
            step_tensor,
            offset_tensor,
            checks.positive("temperature", temperature),
            prediction == "x_0",
            guidance_scale is not None,
            guidance_value,
            guidance_tensor,
            broadcast_samples(keep_mask, x_t),
            broadcast_samples(keep_bits, x_t),
            nonfinite,
            pdl,
            out,
        )
        return out
    logits = plain(h[:, :positions], head).float()
    return flip_step(
        logits[:samples],
        x_t,
        coefficients,
        seed=seed,
        step=step,
        sample_offset=sample_offset,
        temperature=temperature,
        prediction=prediction,
        uncond_logits=None if guidance_scale is None else logits[samples:],
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
        keep_mask=keep_mask,
        keep_bits=keep_bits,
        nonfinite=torch.zeros(1, dtype=torch.int32, device=h.device) if nonfinite is None else nonfinite,
        out=out,
    )


def _check(h: Tensor, head: Head, num_positions: int) -> None:
    checks.floating("h", h)
    if h.dim() != 3 or not h.is_contiguous():
        raise ValueError(f"h: expected a contiguous (B, T, W), got shape {tuple(h.shape)} with strides {h.stride()}")
    checks.integer("num_positions", num_positions, 0, h.shape[1])
    if head.weight.dim() != 2 or head.weight.shape[1] != h.shape[2]:
        raise ValueError(f"head: expected weight (C, {h.shape[2]}) for h {tuple(h.shape)}, got {tuple(head.weight.shape)}")
    checks.same_device("head", head.weight, "h", h)
