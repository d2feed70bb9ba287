"""GELU behind a linear layer whose bias it adds: the bias's gradient is summed in the pass that computes the layer's."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._ops import library
from ..inference.choice import triton_runs_on


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() > 0 and triton_runs_on(x.device)


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    if not _takes(x):
        return F.gelu(x + bias)
    from .triton import gelu as kernels

    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.forward(x.view(-1, x.shape[-1]), bias, out)
    return out


def _gradient(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if not _takes(x):
        u = x + bias
        normal = 0.5 * (1 + torch.erf(u * 0.5**0.5))
        out = grad * (normal + u * torch.exp(-0.5 * u * u) * (2 * math.pi) ** -0.5)
        return out, out.flatten(0, -2).sum(0)
    from .triton import gelu as kernels

    grad, x = grad.contiguous(), x.contiguous()
    out, rows = torch.empty_like(x), (-1, x.shape[-1])
    return out, kernels.backward(grad.view(rows), x.view(rows), bias, out)


TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("bias_gelu(Tensor x, Tensor bias) -> Tensor", tags=TAGS)
library.define("bias_gelu_gradient(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)", tags=TAGS)
library.impl("bias_gelu", _forward, "CompositeExplicitAutograd")
library.impl("bias_gelu_gradient", _gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("bldm::bias_gelu", lib=library)
def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("bldm::bias_gelu_gradient", lib=library)
def _fake_gradient(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.bldm.bias_gelu_gradient(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


torch.library.register_autograd("bldm::bias_gelu", _backward, setup_context=_context, lib=library)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) (Hendrycks & Gimpel 2016, the exact form), x (..., W) and bias (W,) of one floating dtype."""
    return torch.ops.bldm.bias_gelu(x, bias)  # type: ignore[no-any-return]
