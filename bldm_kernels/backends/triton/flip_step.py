"""flip_step and add_noise: packed bits in, packed bits out, one pass."""

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    ADD_NOISE,
    FLIP_STEP,
    NOT_SPECIALIZED,
    any_of,
    bernoulli,
    bit_tile,
    byte_grid,
    byte_tile,
    exp2_scale,
    exp_neg,
    fma,
    load_coefficients,
    mask_padding,
    on_device,
    random_words,
    unpack,
    value_or_load,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def step_bits(
    logits,
    uncond_logits,
    x_t,
    coefficients,
    keep_mask,
    keep_bits,
    nonfinite,
    out,
    seed: tl.int64,
    seed_tensor,
    step: tl.int64,
    step_tensor,
    sample_offset: tl.int64,
    offset_tensor,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    mask_stride,
    bits_stride,
    scale,
    guidance_scale,
    guidance_tensor,
    X0_PREDICTION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """x_s = x_t XOR Bernoulli(N / D), with guidance, either prediction, and kept bits."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
    packed_offsets = sample * sample_bytes + byte
    x = tl.load(x_t + packed_offsets, exists, 0)

    mixed = tl.load(logits + offsets, valid, 0.0).to(tl.float32)
    if uncond_logits is not None:
        uncond = tl.load(uncond_logits + offsets, valid, 0.0).to(tl.float32)
        strength = guidance_scale if guidance_tensor is None else tl.load(guidance_tensor)
        mixed = fma(strength, mixed - uncond, uncond)
    if nonfinite is not None:
        bad = ~(tl.abs(mixed) < float("inf"))
        if any_of(bad):
            tl.atomic_add(nonfinite, tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0))
    if X0_PREDICTION:
        mixed = tl.where(unpack(x) != 0, -mixed, mixed)

    e = exp_neg(mixed, scale)
    n0, n1, d0, d1 = load_coefficients(coefficients, sample, exists, PER_SAMPLE)
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    # Sign and powers of two commute with rounding, so they go to the coefficients instead of to every bit.
    numerator, minus_unit = fma(n0, e, n0 + n1), fma(d0 * -(2.0**-16), e, (d0 + d1) * -(2.0**-16))
    first_sample = value_or_load(sample_offset, offset_tensor)
    flips = bernoulli(numerator, minus_unit, FLIP_STEP, key, draw, sample + first_sample, byte)

    x ^= mask_padding(flips, byte, row_bytes, num_bits, WHOLE_BYTES)
    if keep_mask is not None:
        keep = tl.load(keep_mask + sample * mask_stride + byte, exists, 0)
        kept = tl.load(keep_bits + sample * bits_stride + byte, exists, 0)
        x = x ^ ((x ^ kept) & keep)
    tl.store(out + packed_offsets, x, exists)


@triton.jit
def _compare_lanes(words, bound):
    """[N] int32: which of the eight 16-bit lanes of every byte are below `bound`, and which are equal to it."""
    below, equal = tl.zeros(words[0].shape, tl.int32), tl.zeros(words[0].shape, tl.int32)
    for j in tl.static_range(8):
        lane = (words[j // 2] >> (16 * (j % 2))) & 0xFFFF
        below |= tl.where(lane < bound, 1 << j, 0)
        equal |= tl.where(lane == bound, 1 << j, 0)
    return below, equal


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def noise_bits(
    x_0,
    probability,
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
    PER_SAMPLE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """x_0 XOR Bernoulli(p): a bit flips when its 32-bit uniform number is below ceil(p 2^32)."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    p = tl.load(probability + sample, exists, 0.0) if PER_SAMPLE else tl.load(probability)
    p = tl.where(p > 0, tl.minimum(p, 1.0), 0.0)  # NaN is 0 too
    threshold = tl.ceil(p * 4294967296.0).to(tl.int64)
    upper, lower = (threshold >> 16).to(tl.uint32), (threshold & 0xFFFF).to(tl.uint32)

    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    words = random_words(ADD_NOISE, key, draw, sample + sample_offset, byte)
    below, equal = _compare_lanes(words, upper)
    if tl.max(equal, axis=0) > 0:  # a tie: the lower half of the uniform number decides
        words = random_words(ADD_NOISE + 1, key, draw, sample + sample_offset, byte)
        below |= equal & _compare_lanes(words, lower)[0]
    offsets = sample * sample_bytes + byte
    flips = mask_padding(below.to(tl.uint8), byte, row_bytes, num_bits, WHOLE_BYTES)
    x = tl.load(x_0 + offsets, exists, 0) ^ flips
    tl.store(out + offsets, x, exists)


def _sample_stride(x: Tensor | None) -> int:
    """Of a tensor (B, R, P), or (1, R, P) for all samples."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    temperature: float,
    x0_prediction: bool,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    guidance_tensor: Tensor | None,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
    nonfinite: Tensor | None,
    out: Tensor,
) -> None:
    num_samples, rows, row_bytes = x_t.shape
    num_bits = logits.shape[-1]
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(logits):
        step_bits[grid](
            logits,
            uncond_logits,
            x_t,
            coefficients,
            keep_mask,
            keep_bits,
            nonfinite,
            out,
            seed,
            seed_tensor,
            step,
            step_tensor,
            sample_offset,
            offset_tensor,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            _sample_stride(keep_mask),
            _sample_stride(keep_bits),
            exp2_scale(temperature),
            guidance_scale,
            guidance_tensor,
            X0_PREDICTION=x0_prediction,
            PER_SAMPLE=coefficients.shape[0] > 1,
            WHOLE_BYTES=num_bits % 8 == 0,
            enable_fp_fusion=False,
            **tile,
        )


def add_noise(
    x_0: Tensor,
    flip_probability: Tensor,
    num_bits: int,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    num_samples, rows, row_bytes = x_0.shape
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(x_0):
        noise_bits[grid](
            x_0,
            flip_probability,
            out,
            seed,
            seed_tensor,
            step,
            step_tensor,
            sample_offset,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            PER_SAMPLE=flip_probability.numel() > 1,
            WHOLE_BYTES=num_bits % 8 == 0,
            **tile,
        )
