"""LayerNorm without its weight and bias, which the product behind it has folded in: one pass over the residual stream."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .attention import E4M3, check_scale, to_e4m3
from .choice import triton_runs_on

WIDEST = 8192  # columns that a program holds


def plain(h: Tensor, eps: float, offset: Tensor | None) -> Tensor:
    """The specification, in float64 for float64 h, else float32."""
    x = h.to(torch.float64 if h.dtype == torch.float64 else torch.float32)
    return F.layer_norm(x if offset is None else x + offset, x.shape[-1:], eps=eps)


def supports(h: Tensor) -> bool:
    return h.dtype == torch.bfloat16 and h.shape[-1] <= WIDEST and h.numel() > 0 and triton_runs_on(h.device)


def normalize(
    h: Tensor, eps: float, *, offset: Tensor | None = None, out_scale: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """(h + offset - mean) / sqrt(variance + eps), every row for itself.

    Args:
        h: contiguous (M, W), bfloat16 for the kernel.
        offset: float32 (W,): what the stream still lacks, see `add_product`.
        out_scale: one-element float32 tensor: write e4m3, the result divided by it.
        pdl: as in `attention`.

    Returns: (M, W) in the dtype of h or e4m3.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.floating("h", h)
    if h.dim() != 2 or not h.is_contiguous():
        raise ValueError(f"h: expected a contiguous (M, W), got shape {tuple(h.shape)} with strides {h.stride()}")
    if offset is not None:
        checks.tensor("offset", offset, (torch.float32,))
        checks.shape("offset", offset, h.shape[1:], "one a column")
        checks.same_device("offset", offset, "h", h)
    check_scale(out_scale, "h", h)
    if supports(h):
        from .triton import norm as kernels

        out = torch.empty_like(h, dtype=h.dtype if out_scale is None else E4M3)
        kernels.normalize(h, eps, offset, out_scale, pdl, out)
        return out
    x = plain(h, eps, offset)
    return x.to(h.dtype) if out_scale is None else to_e4m3(x, out_scale)
