"""The products of a transformer layer with what stands beside them: LayerNorm's weight and bias and LayerScale folded into the
weights, bias, GELU, conversion to e4m3, and the addition to the residual stream.

    gamma * (W (g * n + s) + b) = (gamma W g) n + gamma (W s + b)        n: the normalised stream, see `normalize`

Of weights behind a norm the rows add up to 0, which changes nothing, as n has mean 0 (rounding.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, dispatch
from . import cublas
from .attention import E4M3, E4M3_MAX, check_scale, to_e4m3
from .choice import triton_runs_on
from .rounding import centred, lengthened, round_centred

# From 1,024 rows on cuBLASLt is the faster one in e4m3; in more than 4,096, where there is much to do behind a product, ours.
FEW_ROWS, MANY_ROWS = 1024, 4096


class Weights(NamedTuple):
    """A layer, prepared by `prepare`: weight (N, K) in bfloat16, float32, float64 or e4m3; bias (N,) in the dtype of the output;
    for e4m3 two one-element float32 tensors, of what the input and the weights are stored divided by, see `lengthened`."""

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None = None
    weight_scale: Tensor | None = None


def prepare(
    linear: nn.Linear,
    dtype: torch.dtype,
    *,
    norm: nn.LayerNorm | None = None,
    gamma: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Weights:
    """`gamma * linear(norm(h))` as one product of the normalised h, computed in float64.

    Args:
        linear: weight (N, K).
        dtype: of weights and output.
        norm: LayerNorm over K before it.
        gamma: LayerScale (N,) behind it.
        input_scale: one-element float32 tensor: e4m3 weights, for inputs stored as x / input_scale in e4m3. One scale for all
            of a weight: e4m3 is floating point, so rows of other sizes lose nothing unless they are 10^4 times smaller.
    """
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
    if norm is not None:
        if norm.bias is not None:
            bias = bias + weight @ norm.bias.detach().double()
        weight = centred(weight * norm.weight.detach().double())
    if gamma is not None:
        weight, bias = weight * gamma.detach().double()[:, None], bias * gamma.detach().double()
    rounded = round_centred if norm is not None else Tensor.to
    if input_scale is None:
        return Weights(rounded(weight, dtype).contiguous(), bias.to(dtype))
    scale = (weight.abs().max() / E4M3_MAX).clamp(min=1e-30).float().reshape(1)
    low = rounded(weight / scale.double(), E4M3).contiguous()
    return Weights(low, bias.to(dtype), input_scale.float().reshape(1), lengthened(scale.double(), weight, low).float())


def plain(x: Tensor, weights: Weights, gelu: bool = False, bias: bool = True) -> Tensor:
    """The specification, in float64 for float64 x, else with products in the dtype of x and the rest in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.input_scale is not None and weights.weight_scale is not None:
        y = F.linear(x.to(dtype), weights.weight.to(dtype)) * (weights.input_scale * weights.weight_scale).to(dtype)
    else:
        y = F.linear(x, weights.weight.to(x.dtype)).to(dtype)
    y = y + weights.bias.to(dtype) if bias else y
    return F.gelu(y) if gelu else y


def dequantized(weights: Weights) -> Tensor:
    """The weight (N, K) in float64."""
    weight = weights.weight.double()
    return weight if weights.weight_scale is None else weight * weights.weight_scale.double()


def supports(x: Tensor, weights: Weights) -> bool:
    """Whether the kernels take this input: bfloat16 or e4m3 with rows of a multiple of 16 bytes; PyTorch takes the rest."""
    rows, columns = weights.weight.shape
    same = x.dtype == weights.weight.dtype and x.dtype in (torch.bfloat16, E4M3) and weights.bias.dtype == torch.bfloat16
    aligned = columns * x.element_size() % 16 == 0 and rows % 16 == 0 and x.data_ptr() % 16 == 0
    return same and aligned and x.numel() > 0 and triton_runs_on(x.device)


def _by_cublas(x: Tensor) -> bool:
    """What cuBLASLt has as one call, in the epilogue of its product, it does as fast as our kernel or faster: in bfloat16."""
    return x.dtype == torch.bfloat16 and x.is_cuda and dispatch.forced_backend() != "triton"


def _low_by_cublas(x: Tensor, weights: Weights, gelu: bool, bias: bool, residual: bool, out: torch.dtype) -> bool:
    """In e4m3 it does so for many rows. For few, our kernel starts while its predecessor ends."""
    better = len(x) >= FEW_ROWS and (residual or len(x) <= MANY_ROWS)
    return (
        x.dtype == E4M3
        and x.is_cuda
        and better
        and dispatch.forced_backend() != "triton"
        and cublas.available(x.device)
        and cublas.plan_of(cublas.kind_of(x, weights.weight, gelu, bias, residual, out)) is not None
    )


def product(
    x: Tensor,
    weights: Weights,
    *,
    gelu: bool = False,
    out_scale: Tensor | None = None,
    out_inverse: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """A layer: (M, K) -> (M, N).

    Args:
        x: contiguous (M, K), in the dtype of the weights.
        weights: see `prepare`.
        gelu: apply GELU, in the kernels by its tanh form (at most 5e-4 off) with the device's approximate tanh.
        out_scale: one-element float32 tensor: write e4m3, the result divided by it.
        out_inverse: its reciprocal; if it is not at hand, it is computed where it is needed.
        pdl: as in `attention`.

    Returns: (M, N) in e4m3 with out_scale, else in the dtype of the bias.

    Raises: TypeError, ValueError for a wrong argument.
    """
    check_input(x, weights)
    check_scale(out_scale, "x", x)
    check_scale(out_inverse, "x", x)
    if supports(x, weights):
        if out_scale is None and _by_cublas(x):
            if gelu:
                return torch._addmm_activation(weights.bias, x, weights.weight.T, use_gelu=True)
            return torch.addmm(weights.bias, x, weights.weight.T)
        from .triton import product as kernels

        out = x.new_empty(len(x), len(weights.weight), dtype=torch.bfloat16 if out_scale is None else E4M3)
        if _low_by_cublas(x, weights, gelu, True, False, out.dtype):
            if out_scale is not None and out_inverse is None:
                out_inverse = out_scale.reciprocal()
            cublas.product(x, weights, gelu, True, None, out, out_inverse)
        else:
            kernels.product(x, weights, gelu, True, None, out, out_scale, pdl)
        return out
    y = plain(x, weights, gelu)
    return y.to(weights.bias.dtype) if out_scale is None else to_e4m3(y, out_scale)


def add_product(x: Tensor, weights: Weights, h: Tensor, *, pdl: bool = False) -> Tensor:
    """h += x @ W^T in place, *without* the bias: a product that adds to its output has no place for one in cuBLASLt. The caller
    sums the biases of the stream up; what the stream lacks, or has too early, is the `offset` of the next `normalize`.

    Args:
        x, weights, pdl: as in `product`.
        h: contiguous (M, N), in the dtype of the bias.

    Returns: h.

    Raises: TypeError, ValueError for a wrong argument.
    """
    check_input(x, weights)
    checks.tensor("h", h, (weights.bias.dtype,))
    check_sum(h, x, weights)
    if supports(x, weights) and h.data_ptr() % 16 == 0:
        if _by_cublas(x):
            return h.addmm_(x, weights.weight.T)
        from .triton import product as kernels

        if _low_by_cublas(x, weights, False, False, True, h.dtype):
            cublas.product(x, weights, False, False, h, h, None)
        else:
            kernels.product(x, weights, False, False, h, h, None, pdl)
        return h
    return h.copy_(plain(x, weights, bias=False) + h)


def check_input(x: Tensor, weights: Weights) -> None:
    low = weights.weight.dtype == E4M3
    checks.tensor("x", x, (E4M3,) if low else (torch.bfloat16, torch.float32, torch.float64))
    checks.same_device("x", x, "weights.weight", weights.weight)
    if x.dim() != 2 or x.shape[1] != weights.weight.shape[1] or not x.is_contiguous():
        raise ValueError(
            f"x: expected a contiguous (M, {weights.weight.shape[1]}), got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def check_sum(h: Tensor, x: Tensor, weights: Weights) -> None:
    checks.same_device("h", h, "x", x)
    if tuple(h.shape) != (len(x), len(weights.weight)) or not h.is_contiguous():
        raise ValueError(
            f"h: expected a contiguous ({len(x)}, {len(weights.weight)}), got shape {tuple(h.shape)} with strides {h.stride()}"
        )
