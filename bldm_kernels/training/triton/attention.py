"""The gradients of queries, keys and values together, as that of what the qkv product wrote, and their sum over all rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import INTERPRETED, ceil_div, on_device

TILE = {"ROWS": 16, "COLUMNS": 256}
EACH = 256 if not INTERPRETED.value else 32


@triton.jit
def join_parts(q, k, v, out, sums, num_rows, width, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    which = tl.program_id(2)
    part = q
    if which == 1:
        part = k
    elif which == 2:
        part = v
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, EACH, ROWS):
        rows = tl.program_id(0) * EACH + done + tl.arange(0, ROWS)[:, None]
        there = (rows < num_rows) & within[None, :]
        x = tl.load(part + rows.to(tl.int64) * width + columns[None, :], there, 0.0)
        total += x.to(tl.float32)
        tl.store(out + rows.to(tl.int64) * (3 * width) + which * width + columns[None, :], x, there)
    tl.store(sums + (tl.program_id(0) * 3 + which) * width + columns, tl.sum(total, axis=0), within)


def join(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous (B, T, heads, dim) each -> (B, T, 3 heads dim), and its sum over samples and tokens, float32 (3 heads dim,)."""
    width, (samples, tokens) = q.shape[2] * q.shape[3], q.shape[:2]
    rows = samples * tokens
    grid = ceil_div(rows, EACH), ceil_div(width, TILE["COLUMNS"]), 3
    out = q.new_empty(samples, tokens, 3 * width)
    sums = q.new_empty(grid[0], 3 * width, dtype=torch.float32)
    with on_device(q):
        join_parts[grid](q, k, v, out, sums, rows, width, EACH=EACH, **TILE, num_warps=8)
    return out, sums.sum(0)
