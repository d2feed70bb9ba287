"""embed_bits and its backward: bits become +-1 or 0/1 in registers, in front of the tensor cores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, on_device, store_rounded

BLOCK_M, BLOCK_D, BLOCK_C = 64, 128, 64  # positions, columns, bits
NUM_WARPS = 4
PROGRAMS = 528  # that run at a time on a large GPU
BACKWARD_STEPS = 8, 32  # tiles of positions that a program of the backward adds up, at least and at most


@triton.jit
def load_bits(packed, rows, exists, first, num_bits, C: tl.constexpr, SIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """[M, C]: bits first .. first + C of rows [M, 1], as +-1 (SIGNED) or 0/1 in DTYPE."""
    # Eight neighbours load the same byte: from the cache, and cheaper than to spread one byte over eight threads.
    bits = first + tl.arange(0, C)[None, :]
    values = tl.load(packed + rows.to(tl.int64) * ((num_bits + 7) // 8) + bits // 8, exists & (bits < num_bits), 0).to(tl.int32)
    values = (values >> (bits % 8)) & 1
    return (values * 2 - 1 if SIGNED else values).to(tl.float32).to(DTYPE)


@triton.jit
def _dot(bits, values, total):
    """total + bits @ values in float32. float32 values go to the tensor cores in three bfloat16 parts, without a loss."""
    if INTERPRETED:  # whose dot knows no bfloat16
        return tl.dot(bits.to(tl.float32), values.to(tl.float32), total)
    elif values.dtype == tl.float32:
        part = tl.zeros_like(total)  # the tensor cores' own sums are truncated, so they are kept short
        for _ in tl.static_range(3):
            upper = (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            part = tl.dot(bits, upper.to(tl.bfloat16), part)
            values = tl.where(tl.abs(values) == float("inf"), 0.0, values - upper)
        return total + part
    else:
        return tl.dot(bits, values, total)


@triton.jit
def _load_weight(weight, channel, columns, num_bits, width, C: tl.constexpr):
    channels = channel + tl.arange(0, C)[:, None]
    return tl.load(weight + channels.to(tl.int64) * width + columns, (channels < num_bits) & (columns < width), 0.0)


@triton.jit
def embed(
    packed,
    weight,
    bias,
    out,
    num_rows,
    num_bits,
    width,
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Tiles [BLOCK_M, BLOCK_D] of bits (M, C) @ weight (C, D) + bias, all of the same columns: a program that needs few
    weights loads them once. Padding bits meet rows of zeros."""
    column_blocks = tl.cdiv(width, BLOCK_D)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dtype: tl.constexpr = tl.float16 if weight.dtype.element_ty == tl.float16 else tl.bfloat16
    if STEPS == 1:
        held = _load_weight(weight, 0, columns, num_bits, width, BLOCK_C)
    start = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if bias is not None:
        start += tl.load(bias + columns, columns < width, 0.0).to(tl.float32)
    stride = tl.num_programs(0) // column_blocks * BLOCK_M
    row = tl.program_id(0) // column_blocks * BLOCK_M
    while row < num_rows:  # the interpreter's range takes no values of the program
        total = start
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        for step in range(STEPS):
            channel = step * BLOCK_C
            bits = load_bits(packed, rows, rows < num_rows, channel, num_bits, BLOCK_C, SIGNED, dtype)
            if STEPS == 1:
                total = _dot(bits, held, total)
            else:
                total = _dot(bits, _load_weight(weight, channel, columns, num_bits, width, BLOCK_C), total)
        store_rounded(out + rows.to(tl.int64) * width + columns, total, (rows < num_rows) & (columns < width))
        row += stride


@triton.jit
def embed_gradient(
    grad,
    packed,
    partials,
    num_rows,
    num_bits,
    width,
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """partials[s] = a tile [BLOCK_C, BLOCK_D] of bits^T @ grad over STEPS BLOCK_M rows, from s STEPS BLOCK_M on."""
    channel, split = tl.program_id(0) * BLOCK_C, tl.program_id(2)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dtype: tl.constexpr = tl.float16 if grad.dtype.element_ty == tl.float16 else tl.bfloat16
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for step in range(STEPS):
        rows = (split * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        bits = load_bits(packed, rows, rows < num_rows, channel, num_bits, BLOCK_C, SIGNED, dtype)
        exists = (rows < num_rows) & (columns < width)
        total = _dot(tl.trans(bits), tl.load(grad + rows.to(tl.int64) * width + columns, exists, 0.0), total)
    channels = channel + tl.arange(0, BLOCK_C)[:, None]
    offsets = (split.to(tl.int64) * num_bits + channels) * width + columns
    tl.store(partials + offsets, total, (channels < num_bits) & (columns < width))


def _tile(size: int, most: int) -> int:
    """A power of two that tensor cores take, no larger than the problem needs."""
    return min(max(triton.next_power_of_2(size), 16), most)


def embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool, out: Tensor) -> None:
    num_rows, (num_bits, width) = packed.shape[0], weight.shape
    tiles = (_tile(num_rows, BLOCK_M), _tile(width, BLOCK_D * 2 // weight.dtype.itemsize), _tile(num_bits, BLOCK_C))
    column_blocks = triton.cdiv(width, tiles[1])
    grid = (column_blocks * min(max(PROGRAMS // column_blocks, 1), triton.cdiv(num_rows, tiles[0])),)
    with on_device(packed):
        steps = triton.cdiv(num_bits, tiles[2])
        embed[grid](packed, weight, bias, out, num_rows, num_bits, width, signed, *tiles, steps, num_warps=NUM_WARPS)


def embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool, out: Tensor) -> None:
    num_rows, width = grad.shape
    tiles = (_tile(num_rows, BLOCK_M), _tile(width, BLOCK_D * 2 // grad.dtype.itemsize), _tile(num_bits, BLOCK_C))
    blocks = triton.cdiv(num_bits, tiles[2]) * triton.cdiv(width, tiles[1])
    row_tiles = triton.cdiv(num_rows, tiles[0])
    steps = min(max(triton.next_power_of_2(row_tiles * blocks // (2 * PROGRAMS)), BACKWARD_STEPS[0]), BACKWARD_STEPS[1])
    splits = triton.cdiv(row_tiles, steps)
    partials = torch.empty((splits, num_bits, width), dtype=torch.float32, device=grad.device)
    grid = (triton.cdiv(num_bits, tiles[2]), triton.cdiv(width, tiles[1]), splits)
    with on_device(packed):
        embed_gradient[grid](grad, packed, partials, num_rows, num_bits, width, signed, *tiles, steps, num_warps=NUM_WARPS)
    out.copy_(partials.sum(0))
