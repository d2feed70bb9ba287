"""embed_bits and its backward: bits become +-1 or 0/1 in registers, in front of the tensor cores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, on_device, store_rounded

BLOCK_M, BLOCK_D, BLOCK_C = 128, 128, 64  # positions, columns, bits
BACKWARD_M, BACKWARD_C = 64, 64
BACKWARD_STEPS = 8  # tiles of positions that a program of the backward adds up before the fixed-order sum
NUM_WARPS = 8


@triton.jit
def _load_bits(
    packed,
    row,
    num_rows,
    byte,
    num_bits,
    M: tl.constexpr,
    BYTES: tl.constexpr,
    SIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[M, 8 BYTES]: the bits of bytes byte .. byte + BYTES of rows row .. row + M, as +-1 (SIGNED) or 0/1 in DTYPE."""
    row_bytes = (num_bits + 7) // 8
    rows, bytes = row + tl.arange(0, M)[:, None], byte + tl.arange(0, BYTES)[None, :]
    exists = (rows < num_rows) & (bytes < row_bytes)
    values = tl.load(packed + rows.to(tl.int64) * row_bytes + bytes, exists, 0).to(tl.int32)
    bits = (values[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    bits = tl.reshape(bits, (M, BYTES * 8))
    return (bits * 2 - 1 if SIGNED else bits).to(tl.float32).to(DTYPE)


@triton.jit
def _dot(a, b, total):
    """total + a @ b in float32 (the interpreter's dot knows no bfloat16)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


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
    """A tile [BLOCK_M, BLOCK_D] of bits (M, C) @ weight (C, D) + bias. Padding bits meet rows of zeros."""
    column_blocks = tl.cdiv(width, BLOCK_D)
    row = tl.program_id(0) // column_blocks * BLOCK_M
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dtype: tl.constexpr = weight.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in range(STEPS):
        channel = step * BLOCK_C
        bits = _load_bits(packed, row, num_rows, channel // 8, num_bits, BLOCK_M, BLOCK_C // 8, SIGNED, dtype)
        channels = channel + tl.arange(0, BLOCK_C)[:, None]
        exists = (channels < num_bits) & (columns < width)
        total = _dot(bits, tl.load(weight + channels.to(tl.int64) * width + columns, exists, 0.0), total)
    if bias is not None:
        total += tl.load(bias + columns, columns < width, 0.0).to(tl.float32)
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    store_rounded(out + rows.to(tl.int64) * width + columns, total, (rows < num_rows) & (columns < width))


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
    dtype: tl.constexpr = grad.dtype.element_ty
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for step in range(STEPS):
        start = (split * STEPS + step) * BLOCK_M
        bits = _load_bits(packed, start, num_rows, channel // 8, num_bits, BLOCK_M, BLOCK_C // 8, SIGNED, dtype)
        rows = start + tl.arange(0, BLOCK_M)[:, None]
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
    # float32 runs without tensor cores, on the registers of every thread: smaller tiles.
    half = weight.dtype.itemsize // 4
    tiles = (_tile(num_rows, BLOCK_M >> half), _tile(width, BLOCK_D >> half), _tile(num_bits, BLOCK_C >> half))
    grid = (triton.cdiv(num_rows, tiles[0]) * triton.cdiv(width, tiles[1]),)
    with on_device(packed):
        steps = triton.cdiv(num_bits, tiles[2])
        embed[grid](packed, weight, bias, out, num_rows, num_bits, width, signed, *tiles, steps, num_warps=NUM_WARPS)


def embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool, out: Tensor) -> None:
    num_rows, width = grad.shape
    half = grad.dtype.itemsize // 4
    tiles = (_tile(num_rows, BACKWARD_M >> half), _tile(width, BLOCK_D >> half), _tile(num_bits, BACKWARD_C))
    splits = triton.cdiv(num_rows, tiles[0] * BACKWARD_STEPS)
    partials = torch.empty((splits, num_bits, width), dtype=torch.float32, device=grad.device)
    grid = (triton.cdiv(num_bits, tiles[2]), triton.cdiv(width, tiles[1]), splits)
    with on_device(packed):
        embed_gradient[grid](
            grad, packed, partials, num_rows, num_bits, width, signed, *tiles, BACKWARD_STEPS, num_warps=NUM_WARPS
        )
    out.copy_(partials.sum(0))
