"""The sum of two matrices and a bias and its normalised rows, and the gradient of that; every tensor is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, next_power_of_2, on_device, store_rounded
from .sums import sum_of_parts

# Numbers of a program at a time. Of a gradient: programs, whose sums of rows are parts of the whole ones; tiles that are loaded
# while one is computed, and that one.
TILE, PROGRAMS = 2048, 528 if not INTERPRETED.value else 2
STAGES = tl.constexpr(3)


@triton.jit
def add_rows(
    x,
    h,
    bias,
    weight,
    shift,
    total,
    out,
    mean,
    factor,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < WIDTH
    at, there = rows[:, None].to(tl.int64) * WIDTH + columns, (rows < num_rows)[:, None] & within
    added = tl.load(h + at, there, 0.0).to(tl.float32)
    if bias is not None:
        added += tl.load(bias + columns, within, 0.0).to(tl.float32)
    summed = tl.load(x + at, there, 0.0).to(tl.float32) + added
    store_rounded(total + at, summed, there)
    middle = tl.sum(summed, axis=1) * (1.0 / WIDTH)
    centred = tl.where(within, summed - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) * (1.0 / WIDTH) + eps)
    tl.store(mean + rows, middle, rows < num_rows)
    tl.store(factor + rows, inverse, rows < num_rows)
    normal = centred * inverse[:, None] * tl.load(weight + columns, within, 0.0).to(tl.float32)
    store_rounded(out + at, normal + tl.load(shift + columns, within, 0.0).to(tl.float32), there)


@triton.jit
def add_rows_gradient(
    grad,
    past,
    total,
    mean,
    factor,
    weight,
    out,
    sums,
    num_rows,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < WIDTH
    scale = tl.load(weight + columns, within, 0.0).to(tl.float32)
    by_weight, by_shift = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for done in tl.range(0, EACH, ROWS, num_stages=STAGES):
        rows = tl.program_id(0) * EACH + done + tl.arange(0, ROWS)
        known = rows < num_rows
        at, there = rows[:, None].to(tl.int64) * WIDTH + columns, known[:, None] & within
        g = tl.load(grad + at, there, 0.0).to(tl.float32)
        middle, inverse = tl.load(mean + rows, known, 0.0)[:, None], tl.load(factor + rows, known, 0.0)[:, None]
        normal = tl.where(there, (tl.load(total + at, there, 0.0).to(tl.float32) - middle) * inverse, 0.0)
        by_weight += g * normal
        by_shift += g
        scaled = g * scale
        along = tl.sum(scaled * normal, axis=1)[:, None] * (1.0 / WIDTH)
        change = (scaled - tl.sum(scaled, axis=1)[:, None] * (1.0 / WIDTH) - normal * along) * inverse
        if past is not None:
            change += tl.load(past + at, there, 0.0).to(tl.float32)
        change = tl.where(there, change, 0.0)
        by_bias += change
        store_rounded(out + at, change, there)
    to, column = sums + tl.program_id(0) * (3 * WIDTH) + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tl.store(to, tl.sum(by_weight, axis=0), column < WIDTH)
    tl.store(to + WIDTH, tl.sum(by_shift, axis=0), column < WIDTH)
    tl.store(to + 2 * WIDTH, tl.sum(by_bias, axis=0), column < WIDTH)


def forward(
    x: Tensor, h: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + h + bias, its normalised rows, their means and the reciprocals of their deviations, float32 (..., 1)."""
    width = x.shape[-1]
    num_rows, block = x.numel() // width, next_power_of_2(width)
    rows = max(TILE // block, 1)
    total, out = torch.empty_like(x), torch.empty_like(x)
    mean, factor = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
    with on_device(x):
        add_rows[ceil_div(num_rows, rows),](
            x, h, bias, weight, shift, total, out, mean, factor, num_rows, eps, WIDTH=width, ROWS=rows, BLOCK=block, num_warps=4
        )
    return total, out, mean, factor


def backward(
    grad: Tensor, past: Tensor | None, total: Tensor, mean: Tensor, factor: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and h, of weight, shift and bias."""
    width = total.shape[-1]
    num_rows, block = total.numel() // width, next_power_of_2(width)
    rows = max(TILE // block, 1)
    each = ceil_div(ceil_div(num_rows, PROGRAMS), rows) * rows
    programs = ceil_div(num_rows, each)
    out, sums = torch.empty_like(total), total.new_empty(programs, 3, width, dtype=torch.float32)
    with on_device(total):
        add_rows_gradient[programs,](
            grad,
            past,
            total,
            mean,
            factor,
            weight,
            out,
            sums,
            num_rows,
            EACH=each,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
    return out, *sum_of_parts(sums, weight.dtype)  # type: ignore[return-value]
