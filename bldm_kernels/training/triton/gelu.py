"""GELU of rows plus a bias, and its gradient with the bias's; both read and write every tensor once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, on_device, store_rounded

# Rows and columns at a time; of the gradient, the rows of a program, which is one part of a sum.
TILE = {"ROWS": 16, "COLUMNS": 256}
EACH = 256 if not INTERPRETED.value else 32


@triton.jit
def normal(x):
    """The normal distribution and x times its density. Abramowitz & Stegun 7.1.26, within 1e-7: one exponential for both."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    bell = tl.exp2(z * z * -1.4426950408889634)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * tail * bell
    return tl.where(x < 0, tail, 1.0 - tail), x * bell * 0.3989422804014327


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
def gelu_gradient(grad, x, bias, out, sums, num_rows, width, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    b = tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, EACH, ROWS):
        rows = tl.program_id(0) * EACH + done + tl.arange(0, ROWS)[:, None]
        at, there = rows.to(tl.int64) * width + columns[None, :], (rows < num_rows) & within[None, :]
        u = tl.load(x + at, there, 0.0).to(tl.float32) + b
        below, slope = normal(u)
        change = tl.load(grad + at, there, 0.0).to(tl.float32) * (below + slope)
        total += change
        store_rounded(out + at, change, there)
    tl.store(sums + tl.program_id(0) * width + columns, tl.sum(total, axis=0), within)


def forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fill `out`; x and out contiguous (M, W)."""
    rows, width = x.shape
    grid = ceil_div(rows, TILE["ROWS"]), ceil_div(width, TILE["COLUMNS"])
    with on_device(x):
        gelu[grid](x, bias, out, rows, width, **TILE, num_warps=8)


def backward(grad: Tensor, x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the gradient by x; returns the one by the bias, float32 (W,). All others contiguous (M, W)."""
    rows, width = x.shape
    grid = ceil_div(rows, EACH), ceil_div(width, TILE["COLUMNS"])
    sums = x.new_empty(grid[0], width, dtype=torch.float32)
    with on_device(x):
        gelu_gradient[grid](grad, x, bias, out, sums, rows, width, EACH=EACH, **TILE, num_warps=8)
    return sums.sum(0)
