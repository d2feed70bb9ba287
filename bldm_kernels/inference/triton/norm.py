"""A row a program: read once, normalised in registers, written once."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import next_power_of_2, on_device
from .common import dependent_launch, store_scaled


@triton.jit
def rows(h, offset, out_scale, out, width, eps, BLOCK_W: tl.constexpr, PDL: tl.constexpr):
    columns = tl.arange(0, BLOCK_W)
    there = columns < width
    shift = 0.0 if offset is None else tl.load(offset + columns, there, 0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(h + at, there, 0.0).to(tl.float32) + shift
    centred = tl.where(there, x - tl.sum(x, axis=0) / width, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    store_scaled(out + at, centred * tl.rsqrt(variance + eps), there, out_scale)


def normalize(h: Tensor, eps: float, offset: Tensor | None, out_scale: Tensor | None, pdl: bool, out: Tensor) -> None:
    num_rows, width = h.shape
    block_w = next_power_of_2(width)
    warps = max(1, block_w // 1024)  # one, where it can: sums need no exchange between warps
    with on_device(h):
        rows[(num_rows,)](h, offset, out_scale, out, width, eps, BLOCK_W=block_w, num_warps=warps, **dependent_launch(pdl))
