"""The products of a transformer layer with everything that stands beside them, in one kernel each.

y = epilogue(x @ W^T): a LayerNorm before the layer, its bias, GELU, and the addition to the residual stream. The norm is
folded in: with W already times its weight,

    LN(h) @ W^T + b = rstd(h) (h @ W^T - mean(h) rowsum(W)) + b

where mean and rstd of every row come from the moments that whatever wrote h left behind (`row_moments`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from .attention import E4M3, E4M3_MAX, to_e4m3
from .choice import triton_runs_on
from .embed import row_moments

TICKETS = 4096  # tiles whose sum over K may be split among programs


class Weights(NamedTuple):
    """A layer, prepared by `prepare`.

    weight (N, K) bfloat16, float32 or e4m3; bias float32 (N,); sums float32 (N,), of the rows of the weights in full scale,
    where a norm is folded in; scale float32 (N,), of acc to output, for e4m3; eps of the norm; tickets int32, zeros between
    calls: two calls with the same weights may not run at the same time.
    """

    weight: Tensor
    bias: Tensor
    sums: Tensor | None
    scale: Tensor | None
    eps: float
    tickets: Tensor


def prepare(
    linear: nn.Linear,
    dtype: torch.dtype,
    *,
    norm: nn.LayerNorm | None = None,
    gamma: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Weights:
    """`gamma * linear(norm(x))` as one product, computed in float64.

    Args:
        linear: weight (N, K).
        dtype: of the weights: torch.bfloat16 or a wider one.
        norm: LayerNorm over K before it.
        gamma: LayerScale (N,) behind it.
        input_scale: one element: e4m3 weights with a scale a row, for inputs stored as x / input_scale in e4m3.
    """
    weight, bias = linear.weight.detach().double(), torch.zeros(linear.out_features, device=linear.weight.device).double()
    if linear.bias is not None:
        bias = linear.bias.detach().double()
    if norm is not None:
        bias = bias + weight @ norm.bias.detach().double()
        weight = weight * norm.weight.detach().double()
    if gamma is not None:
        weight, bias = weight * gamma.detach().double()[:, None], bias * gamma.detach().double()
    row_scale = torch.ones_like(bias)
    if input_scale is not None:
        row_scale = (weight.abs().amax(1) / E4M3_MAX).clamp(min=1e-30).float().double()
    stored = (weight / row_scale[:, None]).to(dtype if input_scale is None else E4M3).contiguous()
    return Weights(
        stored,
        bias.float(),
        None if norm is None else (stored.double().sum(1) * row_scale).float(),
        None if input_scale is None else (row_scale * input_scale.double()).float(),
        1e-5 if norm is None else norm.eps,
        torch.zeros(TICKETS, dtype=torch.int32, device=weight.device),
    )


def plain(x: Tensor, weights: Weights, moments: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    """The specification, in float64 for float64 x, else with products in the dtype of x and the rest in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.scale is not None:
        y = F.linear(x.to(dtype), weights.weight.to(dtype)) * weights.scale.to(dtype)
    else:
        y = F.linear(x, weights.weight.to(x.dtype)).to(dtype)
    if weights.sums is not None:
        assert moments is not None
        total, squares = moments.to(dtype).sum(1).unsqueeze(-1).unbind(1)
        mean = total / x.shape[-1]
        rstd = torch.rsqrt((squares / x.shape[-1] - mean.square()).clamp(min=0) + weights.eps)
        y = (y - mean * weights.sums.to(dtype)) * rstd
    y = y + weights.bias.to(dtype)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual.to(dtype)


def supports(x: Tensor, weights: Weights) -> bool:
    """Whether the kernel takes this input: bfloat16 or e4m3 with rows that are multiples of 16 bytes; PyTorch takes the rest."""
    rows, columns = weights.weight.shape
    same = x.dtype == weights.weight.dtype and x.dtype in (torch.bfloat16, E4M3)
    return same and columns * x.element_size() % 16 == 0 and rows % 16 == 0 and x.numel() > 0 and triton_runs_on(x.device)


class Stream(NamedTuple):
    """The residual stream: h contiguous (M, W); moments float32 (M, parts, 2) of its rows, see `row_moments`; and where products
    read e4m3, h / scale as `low`."""

    h: Tensor
    moments: Tensor
    low: Tensor | None = None


def stream(h: Tensor, scale: Tensor | None = None) -> Stream:
    """The stream at h (M, W), computed in PyTorch."""
    return Stream(h, row_moments(h, 1), None if scale is None else to_e4m3(h, scale))


def product(
    x: Tensor,
    weights: Weights,
    *,
    moments: Tensor | None = None,
    gelu: bool = False,
    out_scale: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """A layer: (M, K) -> (M, N).

    Args:
        x: contiguous (M, K), in the dtype of the weights.
        weights: see `prepare`.
        moments: float32 (M, parts, 2), of the rows of the stream that x is: with a folded norm.
        gelu: apply GELU (in the kernel by its tanh form, off by at most 5e-4).
        out_scale: one-element float32 tensor: write e4m3, the result divided by it.
        pdl: as in `attention`.

    Returns: (M, N) in e4m3 with out_scale, else bfloat16 for e4m3 x and the dtype of x otherwise.

    Raises: TypeError, ValueError for a wrong argument.
    """
    _check(x, weights, moments)
    dtype = torch.bfloat16 if x.dtype == E4M3 else x.dtype
    if supports(x, weights):
        from .triton import product as kernels

        out = x.new_empty(len(x), len(weights.weight), dtype=dtype if out_scale is None else E4M3)
        kernels.product(x, weights, moments, gelu, None, out, None, None, out_scale, pdl)
        return out
    y = plain(x, weights, moments, gelu, None)
    return y.to(dtype) if out_scale is None else to_e4m3(y, out_scale)


def add_product(
    x: Tensor, weights: Weights, to: Stream, *, gelu: bool = False, low_scale: Tensor | None = None, pdl: bool = False
) -> Stream:
    """Add a layer to the residual stream: `to.h` (M, N) changes in place.

    Args:
        x, weights, gelu, pdl: as in `product`; no folded norm.
        to: the stream; its h in the dtype of x, bfloat16 for e4m3 x.
        low_scale: one-element float32 tensor: also make the e4m3 copy, h divided by it, for whatever reads the stream next.

    Returns: the stream with its new moments and e4m3 copy.

    Raises: TypeError, ValueError for a wrong argument.
    """
    _check(x, weights, None)
    checks.tensor("to.h", to.h, (torch.bfloat16 if x.dtype == E4M3 else x.dtype,))
    checks.same_device("to.h", to.h, "x", x)
    if tuple(to.h.shape) != (len(x), len(weights.weight)) or not to.h.is_contiguous():
        raise ValueError(
            f"to.h: expected a contiguous ({len(x)}, {len(weights.weight)}), got shape {tuple(to.h.shape)} with strides "
            f"{to.h.stride()}"
        )
    if supports(x, weights) and to.h.dtype == torch.bfloat16:
        from .triton import product as kernels

        low = None if low_scale is None else torch.empty_like(to.h, dtype=E4M3)
        moments = kernels.new_moments(x, weights)
        kernels.product(x, weights, None, gelu, to.h, to.h, low, moments, low_scale, pdl)
        return Stream(to.h, moments, low)
    to.h.copy_(plain(x, weights, None, gelu, to.h))
    return stream(to.h, low_scale)


def _check(x: Tensor, weights: Weights, moments: Tensor | None) -> None:
    checks.tensor("x", x, (weights.weight.dtype,) if weights.weight.dtype == E4M3 else (torch.bfloat16, torch.float32, torch.float64))
    checks.same_device("x", x, "weights.weight", weights.weight)
    if x.dim() != 2 or x.shape[1] != weights.weight.shape[1] or not x.is_contiguous():
        raise ValueError(
            f"x: expected a contiguous (M, {weights.weight.shape[1]}), got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    if (moments is not None) != (weights.sums is not None):
        raise ValueError("moments: expected with a folded norm, and only then, got " + ("None" if moments is None else "a tensor"))
    if moments is not None:
        checks.tensor("moments", moments, (torch.float32,))
        checks.same_device("moments", moments, "x", x)
        if moments.dim() != 3 or len(moments) != len(x) or moments.shape[2] != 2 or not moments.is_contiguous():
            raise ValueError(f"moments: expected a contiguous ({len(x)}, parts, 2), got shape {tuple(moments.shape)}")
