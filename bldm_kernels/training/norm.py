"""A residual branch's end and the LayerNorm behind it; their gradients, the branch's bias's among them, in one pass."""

from typing import Any

import torch
from torch import Tensor

from .._ops import library
from ..inference.choice import triton_runs_on

WIDEST = 4096  # of rows that a program of the kernels holds


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() > 0 and x.shape[-1] <= WIDEST and triton_runs_on(x.device)


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(x: Tensor, h: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
    if _takes(x):
        from .triton import norm as kernels

        return kernels.forward(x.contiguous(), h.contiguous(), bias, weight, shift, eps)
    total = x + (h if bias is None else h + bias)
    centred = total.to(_precise(x))
    mean = centred.mean(-1, keepdim=True)
    centred = centred - mean
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return total, (centred * factor * weight + shift).to(x.dtype), mean, factor


def _gradient(
    grad: Tensor, past: Tensor | None, total: Tensor, mean: Tensor, factor: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _takes(total):
        from .triton import norm as kernels

        return kernels.backward(grad.contiguous(), None if past is None else past.contiguous(), total, mean, factor, weight)
    g, normal = grad.to(mean.dtype), (total - mean) * factor
    scaled = g * weight
    out = (scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)) * factor
    out = out if past is None else out + past
    sums = (x.flatten(0, -2).sum(0).to(weight.dtype) for x in (g * normal, g, out))
    return out.to(grad.dtype), *sums  # type: ignore[return-value]


TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(
    "add_norm(Tensor x, Tensor h, Tensor? bias, Tensor weight, Tensor shift, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "add_norm_gradient(Tensor grad, Tensor? past, Tensor total, Tensor mean, Tensor factor, Tensor weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.impl("add_norm", _forward, "CompositeExplicitAutograd")
library.impl("add_norm_gradient", _gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("bldm::add_norm", lib=library)
def _fake(x: Tensor, h: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
    moments = (x.new_empty(*x.shape[:-1], 1, dtype=_precise(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), *moments


@torch.library.register_fake("bldm::add_norm_gradient", lib=library)
def _fake_gradient(
    grad: Tensor, past: Tensor | None, total: Tensor, mean: Tensor, factor: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    return total.new_empty(total.shape), *(weight.new_empty(weight.shape) for _ in range(3))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, _, mean, factor = output
    ctx.save_for_backward(total, mean, factor, inputs[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, past: Tensor | None, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if past is None and grad is None:
        return (None,) * 6
    grad = torch.zeros_like(past) if grad is None else grad  # type: ignore[arg-type]
    out, by_weight, by_shift, by_bias = torch.ops.bldm.add_norm_gradient(grad, past, *ctx.saved_tensors)
    return out, out, by_bias if ctx.needs_input_grad[2] else None, by_weight, by_shift, None


torch.library.register_autograd("bldm::add_norm", _backward, setup_context=_context, lib=library)


def add_norm(
    x: Tensor, h: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + h + bias, and its LayerNorm (Ba et al. 2016).

    Args:
        x, h: (..., W), of one floating dtype: the residual stream, and what a branch adds to it.
        bias: (W,), that of the branch's last layer; or None for none.
        weight, shift, eps: of the norm, (W,) each.

    Returns: two of (..., W)
    """
    return torch.ops.bldm.add_norm(x, h, bias, weight, shift, eps)[:2]  # type: ignore[no-any-return]
