"""Sum, statistics and norm of channels-last activations in one launch.

Programs draw tickets. The tickets of a sample's first pass, which adds up and takes partial moments, come before those of its
second, which normalises: a program of the second pass may wait, since all that it waits for runs already. The first pass of the
next sample lies between the two, so that there is little to wait for, and the second still finds its input in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, next_power_of_2, on_device, store_rounded
from .. import group_norm
from ..group_norm import Norm

BLOCK = 4096  # elements of a tile
STEPS = 8  # tiles that a program takes, at most
MANY = 1024  # programs of a pass that are enough
NUM_WARPS = 4

UPSAMPLED, SHIFTED = tl.constexpr(group_norm.UPSAMPLED), tl.constexpr(group_norm.SHIFTED)


@triton.jit
def is_last(counter, arrivals):
    """Whether this program is the last of `arrivals` to come here, and so sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1) == arrivals - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def grouped_columns(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """[GROUPS * SIZE] channels, group after group, SIZE being that of a group or the next power of two; and which exist."""
    column = tl.arange(0, GROUPS * SIZE)
    if SIZE * GROUPS == CHANNELS:
        return column, column < CHANNELS
    else:
        return column // SIZE * (CHANNELS // GROUPS) + column % SIZE, column % SIZE < CHANNELS // GROUPS


@triton.jit
def finish_statistics(moments, statistics, b, parts, count, eps, GROUPS: tl.constexpr):
    """Mean and 1 / deviation of every group of sample b, from partial sums (parts, 2, GROUPS), always added in the same order."""
    PARTS: tl.constexpr = 2048 // GROUPS if GROUPS < 2048 else 1
    group, row = tl.arange(0, GROUPS), tl.arange(0, PARTS)[:, None]
    at = moments + b.to(tl.int64) * parts * (2 * GROUPS) + group[None, :]
    sums = tl.zeros((PARTS, GROUPS), tl.float32)
    squares = tl.zeros((PARTS, GROUPS), tl.float32)
    part = 0
    while part < parts:
        to = at + (row + part) * (2 * GROUPS)
        # Past the first cache, which is not kept coherent between programs.
        sums += tl.load(to, row + part < parts, 0.0, cache_modifier=".cg")
        squares += tl.load(to + GROUPS, row + part < parts, 0.0, cache_modifier=".cg")
        part += PARTS
    mean = tl.sum(sums, 0) / count
    variance = tl.maximum(tl.sum(squares, 0) / count - mean * mean, 0.0)
    place = statistics + b * (2 * GROUPS) + group
    tl.store(place, mean)
    tl.store(place + GROUPS, 1 / tl.sqrt(variance + eps))


@triton.jit
def scale_and_shift(statistics, weight, bias, b, columns, exists, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """The norm of sample b as x * scale + shift, for these columns."""
    at = statistics + b * (2 * GROUPS) + columns // (CHANNELS // GROUPS)
    mean = tl.load(at, exists, 0.0, cache_modifier=".cg")
    scale = tl.load(weight + columns, exists, 0.0) * tl.load(at + GROUPS, exists, 0.0, cache_modifier=".cg")
    return scale, tl.load(bias + columns, exists, 0.0) - mean * scale


@triton.jit
def silu(x):
    """x * sigmoid(x), the reciprocal to 1 ulp: a division with all its cases would take longer than the memory."""
    if INTERPRETED:
        return x / (1.0 + tl.exp(-x))
    else:
        denominator = 1.0 + tl.exp(-x)
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def which_exist(p, pixels, exists, EVEN: tl.constexpr):
    """[P, C]: pixels and channels that there are; a constant, which costs nothing, where that is all of them."""
    if EVEN:
        return tl.full((p.shape[0], exists.shape[0]), True, tl.int1)
    else:
        return (p < pixels)[:, None] & exists[None, :]


@triton.jit
def load_sum(raw, bias, residual, b, p, columns, exists, inside, height, width, CHANNELS: tl.constexpr, SOURCE: tl.constexpr):
    """raw + bias + residual [P, C] of pixels p of sample b, in float32."""
    b = b.to(tl.int64)
    y, x = p // width, p % width
    if SOURCE == UPSAMPLED:
        row = (b * (height // 2 + 1) + (y + 1) // 2) * (width // 2 + 1) + (x + 1) // 2
        at = row * (4 * CHANNELS) + (y % 2 * 2 + x % 2) * CHANNELS
    elif SOURCE == SHIFTED:
        at = ((b * (height + 1) + y + 1) * (width + 1) + x + 1) * CHANNELS
    else:
        at = (b * (height * width) + p) * CHANNELS
    values = tl.load(raw + at[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, exists, 0.0)[None, :]
    if residual is not None:
        at = (b * (height * width) + p) * CHANNELS
        values += tl.load(residual + at[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["samples", "height", "width"])
def finish_kernel(
    raw,
    bias,
    residual,
    weight,
    shift,
    kept,
    out,
    moments,
    statistics,
    counters,
    samples,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    SOURCE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """kept = raw + bias + residual (unless None); with NORM, its statistics; out = its norm (unless None).

    A program takes STEPS tiles. EVEN: every tile is full.
    """
    pixels = height * width
    parts = tl.cdiv(pixels, BLOCK_P * STEPS)
    if out is not None:
        ticket = tl.atomic_add(counters, 1)
        last_slot = 2 * samples - 1
        if ticket == (last_slot + 1) * parts - 1:
            tl.store(counters, 0)
        slot = ticket // parts
        # Sample 0, then by turns the first pass of sample i + 1 and the second of sample i, and at last the second of the last.
        second = (slot == last_slot) | ((slot > 0) & (slot % 2 == 0))
        b = tl.where(second, tl.where(slot == last_slot, samples - 1, slot // 2 - 1), (slot + 1) // 2)
    else:
        ticket = tl.program_id(0)
        b, second = ticket // parts, ticket < 0  # there is no second pass
    part = ticket % parts
    if NORM:
        arrived, ready, done = counters + 1 + b, counters + 1 + samples + b, counters + 1 + 2 * samples + b
    columns, exists = grouped_columns(CHANNELS, GROUPS, SIZE)
    if second:
        if out is not None:
            while tl.atomic_add(ready, 0) == 0:
                pass
            scale, offset = scale_and_shift(statistics, weight, shift, b, columns, exists, CHANNELS, GROUPS)
            for step in range(STEPS):
                p = (part * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
                inside = which_exist(p, pixels, exists, EVEN)
                at = ((b.to(tl.int64) * pixels + p) * CHANNELS)[:, None] + columns[None, :]
                if kept is None:
                    values = load_sum(raw, bias, residual, b, p, columns, exists, inside, height, width, CHANNELS, SOURCE)
                else:
                    values = tl.load(kept + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
                values = values * scale[None, :] + offset[None, :]
                if SILU:
                    values = silu(values)
                store_rounded(out + at, values, inside)
            if is_last(done, parts):
                tl.store(ready, 0)
    else:
        sums = tl.zeros((BLOCK_P, GROUPS * SIZE), tl.float32)
        squares = tl.zeros((BLOCK_P, GROUPS * SIZE), tl.float32)
        for step in range(STEPS):
            p = (part * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = which_exist(p, pixels, exists, EVEN)
            values = load_sum(raw, bias, residual, b, p, columns, exists, inside, height, width, CHANNELS, SOURCE)
            if kept is not None:
                at = ((b.to(tl.int64) * pixels + p) * CHANNELS)[:, None] + columns[None, :]
                store_rounded(kept + at, values, inside)
            if NORM:
                values = tl.where(inside, values, 0.0)
                sums += values
                squares += values * values
        if NORM:
            to = moments + (b * parts + part).to(tl.int64) * (2 * GROUPS) + tl.arange(0, GROUPS)
            tl.store(to, tl.sum(tl.sum(sums, 0).reshape(GROUPS, SIZE), 1))
            tl.store(to + GROUPS, tl.sum(tl.sum(squares, 0).reshape(GROUPS, SIZE), 1))
            if is_last(arrived, parts):
                count = (pixels * (CHANNELS // GROUPS)).to(tl.float32)
                finish_statistics(moments, statistics, b, parts, count, eps, GROUPS)
                if out is not None:
                    tl.debug_barrier()
                    tl.atomic_add(ready, 1)


def finish(
    raw: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    source: int,
    keep: bool,
    apply: bool,
    shape: tuple[int, ...],
    counters: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    batch, height, width, channels = shape
    groups = 1 if norm is None else norm.groups
    size = next_power_of_2(channels // groups)
    block_p = min(max(BLOCK // (groups * size), 1), next_power_of_2(height * width))
    tiles = ceil_div(height * width, block_p)
    steps = min(STEPS, next_power_of_2(max(batch * tiles // MANY, 1)))
    parts = ceil_div(tiles, steps)
    kept = raw.new_empty(shape) if keep else None
    out = raw.new_empty(shape) if norm is not None and apply else None
    moments = torch.empty(0 if norm is None else batch * parts, 2, groups, device=raw.device)
    statistics = torch.empty(batch, 2, groups, device=raw.device)
    with on_device(raw):
        finish_kernel[(batch * parts * (1 if out is None else 2),)](
            raw,
            bias,
            residual,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            kept,
            out,
            moments,
            statistics,
            counters,
            batch,
            height,
            width,
            0.0 if norm is None else norm.eps,
            CHANNELS=channels,
            SOURCE=source,
            GROUPS=groups,
            SIZE=size,
            NORM=norm is not None,
            SILU=norm is not None and norm.silu,
            BLOCK_P=block_p,
            STEPS=steps,
            EVEN=height * width % (block_p * steps) == 0 and groups * size == channels,
            num_warps=NUM_WARPS,
        )
    return kept, (None if norm is None else statistics) if out is None else out
