"""The token buffer of a step in one launch: tiles of embedded bits, and copies of the extra tokens."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import ceil_div, on_device, store_rounded
from ...backends.triton.embed import load_bits
from .common import dependent_launch, product

BLOCK_C = 64  # bits a product
PART = 128  # columns a program


@triton.jit
def tokens(
    packed,
    weight,
    positions,
    first_extra,
    second_extra,
    out,
    num_samples,
    packed_samples,
    num_positions,
    num_bits,
    width,
    first_stride,
    second_stride,
    EXTRA: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M tokens, PART columns of them: first programs of latent positions, then of extra tokens."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.program_id(1) * PART + tl.arange(0, PART)[None, :]
    column_exists = columns < width
    num_tokens, num_rows = num_positions + EXTRA, num_samples * num_positions
    tiles = tl.cdiv(num_rows, BLOCK_M)
    if tl.program_id(0) < tiles:
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = row[:, None] < num_rows
        inside = exists & column_exists
        position = row % num_positions
        total = tl.load(positions + position[:, None] * width + columns, inside, 0.0)
        source = (row % (packed_samples * num_positions))[:, None]
        for step in range(STEPS):
            bits = load_bits(packed, source, exists, step * BLOCK_C, num_bits, BLOCK_C, True, weight.dtype.element_ty)
            channel = step * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
            weights = tl.load(weight + channel * width + columns, (channel < num_bits) & column_exists, 0.0)
            total = product(bits, weights, total)
        at = (row // num_positions * num_tokens + position).to(tl.int64)[:, None] * width
        store_rounded(out + at + columns, total, inside)
    else:
        row = (tl.program_id(0) - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        sample, which = (row // EXTRA)[:, None], (row % EXTRA)[:, None]
        inside = (sample < num_samples) & column_exists
        token = tl.load(first_extra + sample * first_stride + columns, inside & (which == 0), 0.0).to(tl.float32)
        if EXTRA > 1:
            token += tl.load(second_extra + sample * second_stride + columns, inside & (which == 1), 0.0).to(tl.float32)
        at = (row // EXTRA * num_tokens + num_positions + row % EXTRA).to(tl.int64)[:, None] * width
        store_rounded(out + at + columns, token, inside)


def embed_tokens(packed: Tensor, weight: Tensor, positions: Tensor, extra: list[Tensor], out: Tensor, pdl: bool) -> None:
    num_samples, num_tokens, width = out.shape
    num_positions = num_tokens - len(extra)
    block_m = 64 if num_samples * num_positions > 2048 else 16
    grid = (ceil_div(num_samples * num_positions, block_m) + ceil_div(num_samples * len(extra), block_m), ceil_div(width, PART))
    strides = [0 if len(token) == 1 else token.stride(0) for token in extra]
    first, second = extra[0], extra[-1]
    with on_device(out):
        tokens[grid](
            packed,
            weight,
            positions,
            first,
            second,
            out,
            num_samples,
            len(packed),
            num_positions,
            len(weight),
            width,
            strides[0],
            strides[-1],
            EXTRA=len(extra),
            PART=PART,
            BLOCK_M=block_m,
            BLOCK_C=BLOCK_C,
            STEPS=ceil_div(len(weight), BLOCK_C),
            num_warps=8 if block_m == 64 else 4,
            **dependent_launch(pdl),
        )
