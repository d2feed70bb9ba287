"""Sum, statistics and norm of channels-last activations in one launch.

Programs draw tickets. The tickets of a sample's first pass, which adds up and takes partial moments, come before those of its
second, which normalises: a program of the second pass may wait, since all that it waits for runs already. The first pass of the
next sample lies between the two, so that there is little to wait for, and the second still finds its input in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, next_power_of_2, on_device
from .. import group_norm
from ..group_norm import Norm

BLOCK = 4096  # elements of a tile
STEPS = 4  # tiles of a program, where there are enough of them
MANY = 1024  # programs that are enough
NUM_WARPS = 4
TWO = False

UPSAMPLED, SHIFTED = tl.constexpr(group_norm.UPSAMPLED), tl.constexpr(group_norm.SHIFTED)


@triton.jit
def rounded(values):
    """To bfloat16, to nearest even; the interpreter's own conversion truncates."""
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)


@triton.jit
def is_last(counter, arrivals):
    """Whether this program is the last of `arrivals` to come here, and so sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1) == arrivals - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def finish_statistics(moments, statistics, b, parts, pixels, eps, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Mean and 1 / deviation of every group of sample b, from its partial moments, always added in the same order."""
    PARTS: tl.constexpr = (4096 + GROUPS * SIZE - 1) // (GROUPS * SIZE)
    size: tl.constexpr = CHANNELS // GROUPS
    group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, SIZE)[None, :]
    row = tl.arange(0, PARTS)[:, None, None]
    at = moments + b.to(tl.int64) * parts * (2 * CHANNELS) + (group * size + member)[None] + row * (2 * CHANNELS)
    sums = tl.zeros((PARTS, GROUPS, SIZE), tl.float32)
    squares = tl.zeros((PARTS, GROUPS, SIZE), tl.float32)
    part = 0
    while part < parts:
        exists = (row + part < parts) & (member < size)[None]
        # Past the first cache, which is not kept coherent between programs.
        sums += tl.load(at, exists, 0.0, cache_modifier=".cg")
        squares += tl.load(at + CHANNELS, exists, 0.0, cache_modifier=".cg")
        at += PARTS * 2 * CHANNELS
        part += PARTS
    count = (pixels * size).to(tl.float32)
    mean = tl.sum(tl.sum(sums, 0), 1) / count
    variance = tl.maximum(tl.sum(tl.sum(squares, 0), 1) / count - mean * mean, 0.0)
    place = statistics + b * (2 * GROUPS) + tl.arange(0, GROUPS)
    tl.store(place, mean)
    tl.store(place + GROUPS, 1 / tl.sqrt(variance + eps))


@triton.jit
def scale_and_shift(statistics, weight, bias, b, columns, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """The norm of sample b as x * scale + shift, for these columns."""
    exists = columns < CHANNELS
    at = statistics + b * (2 * GROUPS) + columns // (CHANNELS // GROUPS)
    mean = tl.load(at, exists, 0.0, cache_modifier=".cg")
    scale = tl.load(weight + columns, exists, 0.0) * tl.load(at + GROUPS, exists, 0.0, cache_modifier=".cg")
    return scale, tl.load(bias + columns, exists, 0.0) - mean * scale


@triton.jit
def load_sum(
    raw, bias, residual, b, p, columns, inside, height, width, CHANNELS: tl.constexpr, SOURCE: tl.constexpr
):
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
        values += tl.load(bias + columns, columns < CHANNELS, 0.0)[None, :]
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
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
    PASS: tl.constexpr,
):
    """kept = raw + bias + residual (unless None); with GROUPS, its statistics; out = its norm (unless None)."""
    pixels = height * width
    parts = tl.cdiv(pixels, BLOCK_P * STEPS)
    if out is not None and PASS == 0:
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
        b, second = ticket // parts, PASS == 2
    part = ticket % parts
    if GROUPS > 0:
        arrived, ready, done = counters + 1 + b, counters + 1 + samples + b, counters + 1 + 2 * samples + b
    columns = tl.arange(0, BLOCK_C)
    if second:
        if PASS == 0:
            while tl.atomic_add(ready, 0) == 0:
                pass
        scale, offset = scale_and_shift(statistics, weight, shift, b, columns, CHANNELS, GROUPS)
        for step in tl.static_range(STEPS):
            p = (part * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = (p < pixels)[:, None] & (columns < CHANNELS)[None, :]
            at = ((b.to(tl.int64) * pixels + p) * CHANNELS)[:, None] + columns[None, :]
            if kept is None:
                values = load_sum(raw, bias, residual, b, p, columns, inside, height, width, CHANNELS, SOURCE)
            else:
                values = tl.load(kept + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
            values = values * scale[None, :] + offset[None, :]
            if SILU:
                values = values * tl.sigmoid(values)
            tl.store(out + at, rounded(values), inside)
        if PASS == 0:
            if is_last(done, parts):
                tl.store(ready, 0)
    else:
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for step in tl.static_range(STEPS):
            p = (part * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = (p < pixels)[:, None] & (columns < CHANNELS)[None, :]
            values = load_sum(raw, bias, residual, b, p, columns, inside, height, width, CHANNELS, SOURCE)
            if kept is not None:
                at = ((b.to(tl.int64) * pixels + p) * CHANNELS)[:, None] + columns[None, :]
                tl.store(kept + at, rounded(values), inside)
            if GROUPS > 0:
                values = tl.where(inside, values, 0.0)
                sums += values
                squares += values * values
        if GROUPS > 0:
            to = moments + (b * parts + part).to(tl.int64) * (2 * CHANNELS) + columns
            tl.store(to, tl.sum(sums, 0), columns < CHANNELS)
            tl.store(to + CHANNELS, tl.sum(squares, 0), columns < CHANNELS)
            if is_last(arrived, parts):
                finish_statistics(moments, statistics, b, parts, pixels, eps, CHANNELS, GROUPS, SIZE)
                if out is not None and PASS == 0:
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
    block_c = next_power_of_2(channels)
    block_p = min(max(BLOCK // block_c, 1), next_power_of_2(height * width))
    tiles = ceil_div(height * width, block_p)
    steps = STEPS if batch * tiles >= STEPS * MANY else 1
    parts = ceil_div(tiles, steps)
    groups = 0 if norm is None else norm.groups
    kept = raw.new_empty(shape) if keep else None
    out = raw.new_empty(shape) if norm is not None and apply else None
    moments = torch.empty(batch if groups else 0, parts, 2, channels, device=raw.device)
    statistics = torch.empty(batch, 2, groups, device=raw.device)
    with on_device(raw):
      for which in ((0,) if out is None or not TWO else (1, 2)):
        finish_kernel[(batch * parts * (1 if out is None or TWO else 2),)](
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
            SIZE=next_power_of_2(channels // groups) if groups else 1,
            SILU=norm is not None and norm.silu,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            STEPS=steps, PASS=which,
            num_warps=NUM_WARPS,
        )
    return kept, (statistics if groups else None) if out is None else out
