"""binarize: logits to packed bits, with the channels last or in the middle."""

import triton
import triton.language as tl
from torch import Tensor

from .bits import column_grid, column_tile, pack_where
from .common import (
    BINARIZE,
    NOT_SPECIALIZED,
    bit_tile,
    byte_grid,
    byte_tile,
    exp2_scale,
    exp_neg,
    fma,
    mask_padding,
    on_device,
    random_words,
    value_or_load,
)

DRAWN = 512  # packed bytes a program: with more, one that is not sure would too often cost all of them the exact test
# Half a lane, and more than all errors on the way: see `_quick_bit`.
_MARGIN = tl.constexpr(0.6875)


@triton.jit
def _lane(words, LANE: tl.constexpr):
    """2^23 and the 16-bit lane that decides bit LANE, in float32: a cast of the lane alone takes four times as long."""
    word = words[LANE // 2]
    bits = (word >> 16) if LANE % 2 else (word & 0xFFFF)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _quick_bit(logits, words, scale, LANE: tl.constexpr):
    """Whether the bit is set, and whether that is sure.

    With D = 1 + e and the lane h the bit is set for sure if (h + 1) D 2^-16 <= 1 and clear for sure if h D 2^-16 >= 1; in
    between the tie block decides. So the sign of (h + 1/2) D - 2^16 is sure where that is beyond D / 2. Errors, in units of D:
    2^-5 for an approximate exponential (2^-19 of it, times 2^16 e / D^2 <= 2^14), 0.04 for all roundings here and in the
    definition.
    """
    denominator = 1 + tl.exp2(tl.minimum(logits.to(tl.float32) * scale, 64.0))
    difference = fma(_lane(words, LANE) - (2.0**23 - 0.5), denominator, -(2.0**16))
    return difference < 0, tl.abs(difference) > denominator * _MARGIN  # a NaN is not sure


@triton.jit
def _exact_bit(logits, words, tie_words, scale, LANE: tl.constexpr):
    unit = (1 + exp_neg(logits.to(tl.float32), scale)) * -(2.0**-16)
    remainder = fma(_lane(words, LANE) - 2.0**23, unit, 1.0)
    return fma(_lane(tie_words, LANE) - 2.0**23, unit * 2.0**-16, remainder) > 0


@triton.jit
def _draw(logits, scale, key, draw, sample, byte):
    """Packed bits, of the shape of `byte`, from the logits of their eight channels. Nearly always the quick test does."""
    words = random_words(BINARIZE, key, draw, sample, byte)
    packed = tl.zeros(byte.shape, tl.int32)
    all_sure = tl.full(byte.shape, 1, tl.int1)
    for lane in tl.static_range(8):
        is_set, sure = _quick_bit(logits[lane], words, scale, lane)
        packed |= tl.where(is_set, 1 << lane, 0)
        all_sure = all_sure & sure
    if tl.min(all_sure.to(tl.int32)) == 0:
        tie_words = random_words(BINARIZE + 1, key, draw, sample, byte)
        packed = tl.zeros(byte.shape, tl.int32)
        for lane in tl.static_range(8):
            packed |= tl.where(_exact_bit(logits[lane], words, tie_words, scale, lane), 1 << lane, 0)
    return packed.to(tl.uint8)


@triton.jit
def _split(values):
    """[N, 8] -> eight [N]."""
    low, high = tl.split(tl.reshape(values, (values.shape[0], 2, 2, 2)))  # even and odd lanes
    low0, low1 = tl.split(low)  # lanes 0 4, 2 6
    high0, high1 = tl.split(high)
    l0, l4 = tl.split(low0)
    l2, l6 = tl.split(low1)
    l1, l5 = tl.split(high0)
    l3, l7 = tl.split(high1)
    return l0, l1, l2, l3, l4, l5, l6, l7


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def draw_rows(
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
    scale,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """(B, R, C) -> (B, R, P)."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
    values = _split(tl.load(logits + offsets, valid, 0.0))
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    bits = _draw(values, scale, key, draw, sample + sample_offset, byte)
    bits = mask_padding(bits, byte, row_bytes, num_bits, WHOLE_BYTES)
    tl.store(out + sample * sample_bytes + byte, bits, exists)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def draw_columns(
    logits,
    out,
    seed: tl.int64,
    seed_tensor,
    step: tl.int64,
    step_tensor,
    sample_offset: tl.int64,
    outer_per_sample,
    inner,
    row_bytes,
    num_bits,
    scale,
    WHOLE_BYTES: tl.constexpr,
    POSITIONS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """(B, O, C, I) -> (B, O I, P)."""
    outer, position, byte, exists = column_tile(inner, row_bytes, POSITIONS, BYTES)
    first = logits + (outer * num_bits + byte * 8) * inner + position
    values = ()
    for lane in tl.static_range(8):
        values += (tl.load(first + lane * inner, exists & (byte * 8 + lane < num_bits), 0.0),)  # type: ignore[assignment]
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    sample = outer // outer_per_sample
    row = (outer - sample * outer_per_sample) * inner + position
    bits = _draw(values, scale, key, draw, sample + sample_offset, row * row_bytes + byte)
    bits = mask_padding(bits, byte, row_bytes, num_bits, WHOLE_BYTES)
    tl.store(out + (outer * inner + position) * row_bytes + byte, bits, exists)


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
    draw = (seed, seed_tensor, step, step_tensor, sample_offset)
    row_bytes = out.shape[-1]
    options = {"scale": exp2_scale(1.0), "WHOLE_BYTES": num_bits % 8 == 0, "enable_fp_fusion": False}
    with on_device(logits):
        if inner == 1:
            grid, tile = byte_grid(num_samples, outer * row_bytes)
            draw_rows[grid](logits, out, *draw, num_samples, outer * row_bytes, row_bytes, num_bits, **options, **tile)
        else:
            grid, tile = column_grid(out.view(num_samples * outer, inner, row_bytes), DRAWN)
            draw_columns[grid](logits, out, *draw, outer, inner, row_bytes, num_bits, **options, **tile)
