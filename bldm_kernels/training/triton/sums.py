"""The end of a sum over rows: the parts of it that programs have found, added up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import ceil_div, next_power_of_2, on_device, store_rounded

COLUMNS = 16  # of a program: few, as it is a matter of latency


@triton.jit
def sum_parts(sums, first, second, third, num_parts, width, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    which = tl.program_id(1)
    out = first
    if which == 1:
        out = second
    elif which == 2:
        out = third
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, EACH, ROWS):
        rows = begin + tl.arange(0, ROWS)[:, None]
        at = sums + (rows * tl.num_programs(1) + which) * width + columns[None, :]
        total += tl.load(at, (rows < num_parts) & within[None, :], 0.0)
    store_rounded(out + columns, tl.sum(total, axis=0), within)


def sum_of_parts(sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous float32 (parts, K, W) with K <= 3 -> K of (W,)."""
    parts, count, width = sums.shape
    outs = [sums.new_empty(width, dtype=dtype) for _ in range(count)]
    rows = min(next_power_of_2(parts), 128)
    grid = ceil_div(width, COLUMNS), count
    each = ceil_div(parts, rows) * rows
    with on_device(sums):
        sum_parts[grid](sums, *(outs * 3)[:3], parts, width, EACH=each, ROWS=rows, COLUMNS=COLUMNS, num_warps=4)
    return outs
