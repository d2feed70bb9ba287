"""The canonical form of an op's arguments, which every backend receives: contiguous, and of few shapes."""

import torch
from torch import Tensor


def num_bytes(num_bits: int) -> int:
    return (num_bits + 7) // 8


def result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """(B, ..., K) -> (B, R, K) contiguous."""
    if x.dim() == 3 and x.is_contiguous():  # as it mostly is
        return x
    rows = 1
    for size in x.shape[1:-1]:
        rows *= size
    return x.contiguous().view(x.shape[0], rows, x.shape[-1])


def outer_inner(x: Tensor, dim: int) -> tuple[int, int]:
    """Number of elements before and after a dimension."""
    dim = dim % x.dim()
    outer = inner = 1
    for size in x.shape[:dim]:
        outer *= size
    for size in x.shape[dim + 1 :]:
        inner *= size
    return outer, inner


def split_at(x: Tensor, dim: int) -> tuple[Tensor, int, int]:
    """Contiguous x with its shape seen as (outer, dim, inner): one pass over the tensor as it lies in memory."""
    moved = x.movedim(dim, -1)
    if moved.is_contiguous():
        x, dim = moved, -1
    x = x.contiguous()
    return x, *outer_inner(x, dim)


def coefficient_rows(coefficients: Tensor) -> Tensor:
    return coefficients.contiguous().view(-1, 4)


def broadcast_samples(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask for every sample (B, ..., P) or one for all (..., P) -> (B or 1, R, P)."""
    if x is None:
        return None
    return as_rows(x if x.dim() == like.dim() else x.unsqueeze(0))


def without_padding(x: Tensor | None, num_bits: int) -> Tensor | None:
    """Packed bits (..., P) with zeros behind the last of num_bits, whatever was there."""
    if x is None or num_bits % 8 == 0:
        return x
    return torch.cat([x[..., :-1], x[..., -1:] & ((1 << num_bits % 8) - 1)], dim=-1)


def as_flat(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], -1) if x.numel() else x.new_empty(x.shape[0], 0)
