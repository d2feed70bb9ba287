"""binarize: logits to packed bits, with the channels last or in the middle."""

import triton
import triton.language as tl
from torch import Tensor

from .bits import pack_where
from .common import (
    BINARIZE,
    NOT_SPECIALIZED,
    bernoulli,
    byte_grid,
    byte_tile,
    exp2_scale,
    exp_neg,
    mask_padding,
    on_device,
    value_or_load,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def draw_from_logits(
    logits,
    out,
    seed: tl.int64,
    seed_tensor,
    step: tl.int64,
    step_tensor,
    sample_offset: tl.int64,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    inner,
    scale,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """(B, O, C, I) -> (B, O I, P). Threads follow the logits in memory, so position varies faster than byte."""
    sample, index, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    index = index.to(tl.uint32)
    line = index // tl.cast(inner, tl.uint32)  # o P + p
    position = (index - line * inner).to(tl.int64)
    o = line // tl.cast(row_bytes, tl.uint32)
    p = (line - o * row_bytes).to(tl.int64)
    row = o.to(tl.int64) * inner + position

    channel = (p * 8)[:, None] + tl.arange(0, 8)[None, :]
    valid = exists[:, None] & (channel < num_bits)
    outer = sample * (sample_bytes // (row_bytes * inner)) + o.to(tl.int64)
    offsets = ((outer * num_bits) * inner + position)[:, None] + channel * inner
    e = exp_neg(tl.load(logits + offsets, valid, 0.0).to(tl.float32), scale)

    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    byte = row * row_bytes + p
    one = tl.full((1, 1), 1.0, tl.float32)
    bits = bernoulli(one, (1 + e) * -(2.0**-16), BINARIZE, key, draw, sample + sample_offset, byte)
    bits = mask_padding(bits, byte, row_bytes, num_bits, WHOLE_BYTES)
    tl.store(out + sample * sample_bytes + byte, bits, exists)


def binarize(
    logits: Tensor,
    bernoulli: bool,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    num_samples, outer, num_bits, inner = logits.shape
    if not bernoulli:
        return pack_where(logits.flatten(0, 1), "positive", out.view(num_samples * outer, inner, -1))
    sample_bytes = outer * inner * out.shape[-1]
    grid, tile = byte_grid(num_samples, sample_bytes)
    with on_device(logits):
        draw_from_logits[grid](
            logits,
            out,
            seed,
            seed_tensor,
            step,
            step_tensor,
            sample_offset,
            num_samples,
            sample_bytes,
            out.shape[-1],
            num_bits,
            inner,
            exp2_scale(1.0),
            WHOLE_BYTES=num_bits % 8 == 0,
            enable_fp_fusion=False,
            **tile,
        )
