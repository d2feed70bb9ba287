"""What the first reader of the residual stream needs of it: a row a program, read once, with its moments in registers."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import next_power_of_2, on_device
from ..stream import Reader, Stream
from .common import dependent_launch, store_scaled


@triton.jit
def moments(h, offset, scale, sums, low, width, BLOCK_W: tl.constexpr, PDL: tl.constexpr):
    columns = tl.arange(0, BLOCK_W)
    row = tl.program_id(0).to(tl.int64)
    there = columns < width
    if offset is not None:
        shift = tl.load(offset + columns, there, 0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = row * width + columns
    x = tl.load(h + at, there, 0.0)
    if offset is not None:
        x = (x.to(tl.float32) + shift).to(x.dtype)
        tl.store(h + at, x, there)
    x = x.to(tl.float32)
    tl.store(sums + 2 * row, tl.sum(x))
    tl.store(sums + 2 * row + 1, tl.sum(x * x))
    if low is not None:
        store_scaled(low + at, x, there, scale)


def enter(stream: Stream, reader: Reader, offset: Tensor | None, pdl: bool) -> None:
    """Add the offset (W,), and fill the moments (M, 1, 2) of the stream, and its e4m3 copy if it has one."""
    h, sums, low = stream
    block_w = next_power_of_2(h.shape[1])
    warps = max(1, block_w // 1024)  # one, where it can: sums need no exchange between warps
    options = {"BLOCK_W": block_w, "num_warps": warps, **dependent_launch(pdl)}
    with on_device(h):
        moments[(len(h),)](h, offset, reader.input_scale, sums, low, h.shape[1], **options)
