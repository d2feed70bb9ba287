"""A row or two a program: read once, normalised in registers, written once."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import ceil_div, next_power_of_2, on_device
from .common import dependent_launch, store_scaled

MANY_ROWS = 4096  # from which on two of a program that writes e4m3 still fill a GPU, and keep more reads in flight


@triton.jit
def rows(h, offset, out_scale, out, num_rows, width, eps, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr):
    columns = tl.arange(0, BLOCK_W)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    there = columns < width
    if ROWS > 1:
        there &= row < num_rows
    shift = 0.0 if offset is None else tl.load(offset + columns, columns < width, 0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = row.to(tl.int64) * width + columns
    x = tl.load(h + at, there, 0.0).to(tl.float32) + shift
    centred = tl.where(there, x - tl.sum(x, axis=1)[:, None] / width, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / width
    store_scaled(out + at, centred * tl.rsqrt(variance + eps), there, out_scale)


def normalize(h: Tensor, eps: float, offset: Tensor | None, out_scale: Tensor | None, pdl: bool, out: Tensor) -> None:
    num_rows, width = h.shape
    block_w = next_power_of_2(width)
    warps = max(1, block_w // 1024)  # one, where it can: sums need no exchange between warps
    tile = {"ROWS": 2 if out_scale is not None and num_rows >= MANY_ROWS else 1, "BLOCK_W": block_w}
    with on_device(h):
        rows[(ceil_div(num_rows, tile["ROWS"]),)](
            h, offset, out_scale, out, num_rows, width, eps, num_warps=warps, **tile, **dependent_launch(pdl)
        )
