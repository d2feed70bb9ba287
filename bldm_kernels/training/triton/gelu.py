"""GELU of rows plus a bias, and its gradient with the bias's; both read and write every tensor once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, on_device, store_rounded
from .sums import sum_of_parts

# Rows and columns at a time; of a gradient, rows of a program, whose sum is a part of the whole one.
TILE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 4}
EACH = 128 if not INTERPRETED.value else 32
STAGES = tl.constexpr(4)  # tiles of a gradient that are loaded while one is computed, and that one


@triton.jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def power_of_two(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def normal(x):
    """The normal distribution, and the bell of its density. Abramowitz & Stegun 7.1.26, within 1e-7: one exponential for both."""
    t = reciprocal(1.0 + tl.abs(x) * (0.3275911 * 0.7071067811865476))
    bell = power_of_two(x * x * -0.7213475204444817)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def gelu(x, bias, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    at, there = rows.to(tl.int64) * width + columns[None, :], (rows < num_rows) & within[None, :]
    u = tl.load(x + at, there, 0.0).to(tl.float32) + tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
    below, _ = normal(u)
    store_rounded(out + at, u * below, there)


@triton.jit
def gelu_gradient(
    grad,
    x,
    bias,
    out,
    sums,
    num_rows,
    width,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    b = tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in tl.range(0, EACH, ROWS, num_stages=STAGES):
        rows = tl.program_id(0) * EACH + done + tl.arange(0, ROWS)[:, None]
        at, there = rows.to(tl.int64) * width + columns[None, :], (rows < num_rows) & within[None, :]
        u = tl.load(x + at, there, 0.0).to(tl.float32) + b
        below, bell = normal(u)
        change = tl.load(grad + at, there, 0.0).to(tl.float32) * (below + u * (bell * 0.3989422804014327))
        total += change
        store_rounded(out + at, change, there)
    tl.store(sums + tl.program_id(0) * width + columns, tl.sum(total, axis=0), within)


def forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fill `out`; x and out contiguous (M, W)."""
    rows, width = x.shape
    grid = ceil_div(rows, TILE["ROWS"]), ceil_div(width, TILE["COLUMNS"])
    with on_device(x):
        gelu[grid](x, bias, out, rows, width, **TILE)


def backward(grad: Tensor, x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the gradient by x; returns the one by the bias (W,). All others contiguous (M, W)."""
    rows, width = x.shape
    grid = ceil_div(rows, EACH), ceil_div(width, TILE["COLUMNS"])
    sums = x.new_empty(grid[0], 1, width, dtype=torch.float32)
    with on_device(x):
        gelu_gradient[grid](grad, x, bias, out, sums, rows, width, EACH=EACH, **TILE)
    return sum_of_parts(sums, bias.dtype)[0]
