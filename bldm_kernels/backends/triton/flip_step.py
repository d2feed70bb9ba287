"""flip_step and add_noise: packed bits in, packed bits out, one pass.

A program goes over the tiles of packed bytes of a part of a sample, or over one tile of several small samples, by the
filter of bernoulli.py. Then it returns to the few tiles with a byte that the filter left open, which is not written yet.
It is one warp, so that an open byte costs the time of one warp.
"""

import triton
import triton.language as tl
from torch import Tensor

from .bernoulli import cube, line, noise_filter, quick_bits, step_filter
from .common import (
    ADD_NOISE,
    FLIP_STEP,
    NOT_SPECIALIZED,
    any_of,
    bernoulli,
    bit_tile,
    ceil_div,
    exp2_clamped,
    exp2_scale,
    fma,
    load_coefficients,
    mask_padding,
    next_power_of_2,
    on_device,
    random_words,
    value_or_load,
)

# Packed bytes a tile; more in the interpreter, whose cost is by the operation rather than by the element.
BLOCK = 2048 if triton.knobs.runtime.interpret else 64
# One tile a program until there are this many programs, enough for a large GPU twice over; then up to MAX_TILES.
PROGRAMS = 8192
MAX_TILES = 16


@triton.jit
def first_byte(sample_bytes, SAMPLES: tl.constexpr, BYTES: tl.constexpr, TILES: tl.constexpr):
    """The first sample of the program and the first byte of its tiles, int64."""
    chunks = tl.cdiv(sample_bytes, BYTES * TILES).to(tl.uint32)
    program = tl.program_id(0).to(tl.uint32)
    group = program // chunks
    return group.to(tl.int64) * SAMPLES, (program - group * chunks).to(tl.int64) * (BYTES * TILES)


@triton.jit
def tile_bytes(sample, byte, num_samples, sample_bytes, SAMPLES: tl.constexpr, BYTES: tl.constexpr):
    """Of every byte of the tile at `sample`, `byte`: sample, index within it, offset (int64), and whether it exists."""
    i = tl.arange(0, SAMPLES * BYTES)
    row, column = i // BYTES, i % BYTES
    # A thread shall hold the bytes whose bits it computes: not four neighbours, as is best for bytes alone.
    offset = tl.max_contiguous(sample * sample_bytes + byte + row * sample_bytes + column, 1)
    exists = (row < num_samples - sample) & (column < sample_bytes - byte)
    return sample + row, byte + column, offset, exists


@triton.jit
def guided(logits, uncond_logits, strength, at, sample_bytes, row_bytes, num_bits, WHOLE_BYTES: tl.constexpr):
    """[N, 8] float32: the guided logits of the tile `at`, of which `tile_bytes` tells."""
    sample, byte, offset, exists = at
    if WHOLE_BYTES:
        offsets, valid = (offset * 8)[:, None] + tl.arange(0, 8)[None, :], exists[:, None]
    else:
        offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, False)
    mixed = tl.load(logits + offsets, valid, 0.0).to(tl.float32)
    if uncond_logits is not None:
        uncond = tl.load(uncond_logits + offsets, valid, 0.0).to(tl.float32)
        mixed = fma(strength, mixed - uncond, uncond)
    return mixed


@triton.jit
def exponents(mixed, scale, x, X0_PREDICTION: tl.constexpr):
    """y = -l log2(e) / temperature, with l the logit of x_0 != x_t."""
    y = mixed * scale
    if X0_PREDICTION:
        signs = (x.to(tl.int32)[:, None] << (31 - tl.arange(0, 8)[None, :])) & -0x80000000
        y = (y.to(tl.int32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)
    return y


@triton.jit
def store_kept(pointers, x, mask, keep_mask, keep_bits, mask_stride, bits_stride, sample, byte):
    """Store x, but for the bits that are known: where keep_mask is set, those of keep_bits."""
    if keep_mask is not None:
        keep = tl.load(keep_mask + sample * mask_stride + byte, mask, 0)
        kept = tl.load(keep_bits + sample * bits_stride + byte, mask, 0)
        x = x ^ ((x ^ kept) & keep)
    tl.store(pointers, x, mask)


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
    TILES: tl.constexpr,
):
    """x_s = x_t XOR Bernoulli(N / D), with guidance, either prediction, and kept bits."""
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    offset_of_samples = value_or_load(sample_offset, offset_tensor)
    strength = guidance_scale if guidance_tensor is None else tl.load(guidance_tensor)
    first, begin = first_byte(sample_bytes, SAMPLES, BYTES, TILES)
    if PER_SAMPLE and SAMPLES > 1:
        samples = first + tl.arange(0, SAMPLES * BYTES) // BYTES
        n0, n1, d0, d1 = load_coefficients(coefficients, samples, samples < num_samples, True)
    else:
        n0, n1, d0, d1 = load_coefficients(coefficients + (first * 4 if PER_SAMPLE else 0), first, True, False)
    d_line, n_line, limit_line = step_filter(n0, n1, d0, d1)

    open_bytes = tl.zeros((SAMPLES * BYTES,), tl.int32)  # bit i: of tile i
    for tile in range(TILES):
        at = tile_bytes(first, begin + tile * BYTES, num_samples, sample_bytes, SAMPLES, BYTES)
        sample, byte, offset, exists = at
        mixed = guided(logits, uncond_logits, strength, at, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
        x = tl.load(x_t + offset, exists, 0)
        e = tl.exp2(tl.minimum(exponents(mixed, scale, x, X0_PREDICTION), 64.0))
        d, minus_n, limit = cube(line(d_line, e)), cube(line(n_line, e)), cube(line(limit_line, e))
        flips, sure = quick_bits(d, minus_n, limit, FLIP_STEP, key, draw, sample + offset_of_samples, byte)
        if nonfinite is not None:
            sure &= tl.abs(tl.sum(mixed, axis=1)) < float("inf")
        open_bytes |= tl.where(sure, 0, 1 << tile)
        x ^= mask_padding(flips, byte, row_bytes, num_bits, WHOLE_BYTES)
        store_kept(out + offset, x, exists & sure, keep_mask, keep_bits, mask_stride, bits_stride, sample, byte)

    if tl.max(open_bytes, axis=0) != 0:
        for tile in range(TILES):
            is_open = (open_bytes >> tile) & 1
            if tl.max(is_open, axis=0) != 0:
                at = tile_bytes(first, begin + tile * BYTES, num_samples, sample_bytes, SAMPLES, BYTES)
                sample, byte, offset, exists = at
                exists &= is_open != 0
                mixed = guided(logits, uncond_logits, strength, at, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
                if nonfinite is not None:
                    bad = ~(tl.abs(mixed) < float("inf"))
                    if any_of(bad):
                        tl.atomic_add(nonfinite, tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0))
                x = tl.load(x_t + offset, exists, 0)
                e = exp2_clamped(exponents(mixed, scale, x, X0_PREDICTION))
                numerator, minus_unit = fma(n0, e, n0 + n1), fma(d0 * -(2.0**-16), e, (d0 + d1) * -(2.0**-16))
                flips = bernoulli(numerator, minus_unit, FLIP_STEP, key, draw, sample + offset_of_samples, byte)
                x ^= mask_padding(flips, byte, row_bytes, num_bits, WHOLE_BYTES)
                store_kept(out + offset, x, exists, keep_mask, keep_bits, mask_stride, bits_stride, sample, byte)


@triton.jit
def compare_lanes(words, bound):
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
    TILES: tl.constexpr,
):
    """x_0 XOR Bernoulli(p)."""
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    first, begin = first_byte(sample_bytes, SAMPLES, BYTES, TILES)
    if PER_SAMPLE and SAMPLES > 1:
        samples = first + tl.arange(0, SAMPLES * BYTES) // BYTES
        p = tl.load(probability + samples, samples < num_samples, 0.0)
    else:
        p = tl.load(probability + (first if PER_SAMPLE else 0))
    p = tl.where(p > 0, tl.minimum(p, 1.0), 0.0)  # NaN is 0 too
    d, minus_n, limit = noise_filter(p)
    if PER_SAMPLE and SAMPLES > 1:
        minus_n = minus_n[:, None, None, None]

    open_bytes = tl.zeros((SAMPLES * BYTES,), tl.int32)  # bit i: of tile i
    for tile in range(TILES):
        sample, byte, offset, exists = tile_bytes(first, begin + tile * BYTES, num_samples, sample_bytes, SAMPLES, BYTES)
        x = tl.load(x_0 + offset, exists, 0)
        flips, sure = quick_bits(d, minus_n, limit, ADD_NOISE, key, draw, sample + sample_offset, byte)
        open_bytes |= tl.where(sure, 0, 1 << tile)
        tl.store(out + offset, x ^ mask_padding(flips, byte, row_bytes, num_bits, WHOLE_BYTES), exists & sure)

    if tl.max(open_bytes, axis=0) != 0:
        # A bit flips when its 32-bit uniform number is below ceil(p 2^32).
        threshold = tl.ceil(p * 4294967296.0).to(tl.int64)
        upper, lower = (threshold >> 16).to(tl.uint32), (threshold & 0xFFFF).to(tl.uint32)
        for tile in range(TILES):
            is_open = (open_bytes >> tile) & 1
            if tl.max(is_open, axis=0) != 0:
                at = tile_bytes(first, begin + tile * BYTES, num_samples, sample_bytes, SAMPLES, BYTES)
                sample, byte, offset, exists = at
                exists &= is_open != 0
                x = tl.load(x_0 + offset, exists, 0)
                sample += sample_offset
                below, equal = compare_lanes(random_words(ADD_NOISE, key, draw, sample, byte), upper)
                below |= equal & compare_lanes(random_words(ADD_NOISE + 1, key, draw, sample, byte), lower)[0]
                flips = mask_padding(below.to(tl.uint8), byte, row_bytes, num_bits, WHOLE_BYTES)
                tl.store(out + offset, x ^ flips, exists)


def _grid(num_samples: int, sample_bytes: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and every program's tiles: TILES of SAMPLES x BYTES packed bytes."""
    num_bytes = min(next_power_of_2(sample_bytes), BLOCK)
    samples = BLOCK // num_bytes
    tiles = 1
    while tiles < MAX_TILES and num_samples * ceil_div(sample_bytes, 4 * tiles * num_bytes) >= PROGRAMS * samples:
        tiles *= 4
    grid = ceil_div(num_samples, samples) * ceil_div(sample_bytes, num_bytes * tiles)
    return (grid,), {"SAMPLES": samples, "BYTES": num_bytes, "TILES": tiles, "num_warps": 1}


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
    grid, tile = _grid(num_samples, rows * row_bytes)
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
    grid, tile = _grid(num_samples, rows * row_bytes)
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
            enable_fp_fusion=False,
            **tile,
        )
