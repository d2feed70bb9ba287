"""Final norm, head product, flip and packing: logits exist in registers only.

A program reads BLOCK_M rows of h once, for their products with BLOCK_C channels of the head and their mean and variance. Its
logits then become bits as those of `flip_step` do (docs/random-stream.md), by the same functions.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import (
    FLIP_STEP,
    NOT_SPECIALIZED,
    any_of,
    bernoulli,
    ceil_div,
    exp2_clamped,
    exp2_scale,
    fma,
    load_coefficients,
    mask_padding,
    next_power_of_2,
    on_device,
    value_or_load,
)
from ...backends.triton.flip_step import exponents, store_kept
from .common import dependent_launch, product


@triton.jit
def _logits(h, rows, exists, weight, sums, bias, num_bits, width, eps, channels, BLOCK_K: tl.constexpr, STEPS: tl.constexpr):
    """[M, C] logits of the tokens `rows` [M]; 0 where there is no token or no channel."""
    M: tl.constexpr = rows.shape[0]
    C: tl.constexpr = channels.shape[0]
    products = tl.zeros((M, C), tl.float32)
    values, squares = tl.zeros((M, BLOCK_K), tl.float32), tl.zeros((M, BLOCK_K), tl.float32)
    there = channels < num_bits
    for step in range(STEPS):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        inside = columns < width
        x = tl.load(h + rows[:, None] * width + columns, exists[:, None] & inside, 0.0)
        w = tl.load(weight + channels[:, None] * width + columns, there[:, None] & inside, 0.0)
        products = product(x, tl.trans(w), products)
        x = x.to(tl.float32)
        values, squares = values + x, fma(x, x, squares)
    mean = tl.sum(values, axis=1) / width
    variance = tl.maximum(tl.sum(squares, axis=1) / width - mean * mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    logits = (products - mean[:, None] * tl.load(sums + channels, there, 0.0)[None, :]) * rstd[:, None]
    logits += tl.load(bias + channels, there, 0.0)[None, :]
    return tl.where(exists[:, None] & there[None, :], logits, 0.0)


@triton.jit
def head_logits(
    h,
    weight,
    sums,
    bias,
    logits,
    num_samples,
    num_positions,
    num_tokens,
    num_bits,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The logits themselves, float32 (B, N, C)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    exists = row < num_samples * num_positions
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = row // num_positions * num_tokens + row % num_positions
    said = _logits(h, rows, exists, weight, sums, bias, num_bits, width, eps, channels, BLOCK_K, STEPS)
    tl.store(logits + row[:, None] * num_bits + channels[None, :], said, exists[:, None] & (channels < num_bits)[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def head_step(
    h,
    weight,
    sums,
    bias,
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
    num_positions,
    num_tokens,
    num_bits,
    width,
    mask_stride,
    bits_stride,
    eps,
    scale,
    guidance_scale,
    guidance_tensor,
    GUIDED: tl.constexpr,
    X0_PREDICTION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x_s = x_t XOR Bernoulli(N / D) for BLOCK_C bits of BLOCK_M positions."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    exists = row < num_samples * num_positions
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = row // num_positions * num_tokens + row % num_positions
    # Packed bytes of the tile, and all they need but the logits, which come last.
    BYTES: tl.constexpr = BLOCK_C // 8
    i = tl.arange(0, BLOCK_M * BYTES)
    place = (tl.program_id(0) * BLOCK_M + i // BYTES).to(tl.int64)
    column, row_bytes = tl.program_id(1) * BYTES + i % BYTES, (num_bits + 7) // 8
    there = (place < num_samples * num_positions) & (column < row_bytes)
    sample, offset = place // num_positions, place * row_bytes + column
    byte = place % num_positions * row_bytes + column
    x = tl.load(x_t + offset, there, 0)
    n0, n1, d0, d1 = load_coefficients(coefficients, sample, there, PER_SAMPLE)
    key, draw = value_or_load(seed, seed_tensor), value_or_load(step, step_tensor)
    first = value_or_load(sample_offset, offset_tensor)

    mixed = _logits(h, rows, exists, weight, sums, bias, num_bits, width, eps, channels, BLOCK_K, STEPS)
    if GUIDED:
        rows += num_samples * num_tokens
        uncond = _logits(h, rows, exists, weight, sums, bias, num_bits, width, eps, channels, BLOCK_K, STEPS)
        strength = guidance_scale if guidance_tensor is None else tl.load(guidance_tensor)
        mixed = fma(strength, mixed - uncond, uncond)

    mixed = tl.reshape(mixed, (BLOCK_M * BYTES, 8))
    if nonfinite is not None:
        bad = ~(tl.abs(mixed) < float("inf"))
        if any_of(bad):
            tl.atomic_add(nonfinite, tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0))
    e = exp2_clamped(exponents(mixed, scale, x, X0_PREDICTION))
    numerator, minus_unit = fma(n0, e, n0 + n1), fma(d0 * -(2.0**-16), e, (d0 + d1) * -(2.0**-16))
    flips = bernoulli(numerator, minus_unit, FLIP_STEP, key, draw, sample + first, byte)
    x ^= mask_padding(flips, byte, row_bytes, num_bits, WHOLE_BYTES)
    store_kept(out + offset, x, there, keep_mask, keep_bits, mask_stride, bits_stride, sample, byte)


# Up to how many rows: rows, channels and k of a program, and its warps, without guidance and with it, which needs more registers.
TILES = ((512, 16, 16, 128, 4, 4), (1024, 16, 32, 128, 4, 4), (4096, 16, 64, 64, 2, 2), (2**62, 32, 64, 64, 2, 4))


def _tiles(num_rows: int, num_bits: int, width: int, guided: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: small ones where there are few rows, so that the whole GPU takes part.

    Never 64 rows: their product would run asynchronously, and Triton 3.6 would load the next tile of h over the one it still
    reads, since a tile that is also read into registers, here for its mean and variance, gets one buffer too few.
    """
    block_m, most, block_k, *warps = next(tile for rows, *tile in TILES if num_rows <= rows)
    block_c = min(max(next_power_of_2(num_bits), 16), most)
    grid = (ceil_div(num_rows, block_m), ceil_div(num_bits, block_c))
    tile = {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_K": block_k, "STEPS": ceil_div(width, block_k)}
    return grid, tile | {"num_warps": warps[guided], "num_stages": 4}


def logits(h: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float, num_positions: int, pdl: bool, out: Tensor) -> None:
    num_samples, num_tokens, width = h.shape
    grid, tile = _tiles(num_samples * num_positions, len(weight), width, False)
    sizes = (num_samples, num_positions, num_tokens, len(weight), width, eps)
    with on_device(h):
        head_logits[grid](h, weight, sums, bias, out, *sizes, **dependent_launch(pdl), enable_fp_fusion=False, **tile)


def _sample_stride(x: Tensor | None) -> int:
    """Of a tensor (B, N, P), or (1, N, P) for all samples."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def step(
    h: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor,
    eps: float,
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
    guided: bool,
    guidance_scale: float,
    guidance_tensor: Tensor | None,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
    nonfinite: Tensor | None,
    pdl: bool,
    out: Tensor,
) -> None:
    num_samples, num_positions = x_t.shape[:2]
    num_bits, width = weight.shape
    grid, tile = _tiles(num_samples * num_positions, num_bits, width, guided)
    with on_device(h):
        head_step[grid](
            h,
            weight,
            sums,
            bias,
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
            num_positions,
            h.shape[1],
            num_bits,
            width,
            _sample_stride(keep_mask),
            _sample_stride(keep_bits),
            eps,
            exp2_scale(temperature),
            guidance_scale,
            guidance_tensor,
            GUIDED=guided,
            X0_PREDICTION=x0_prediction,
            PER_SAMPLE=coefficients.shape[0] > 1,
            WHOLE_BYTES=num_bits % 8 == 0,
            **dependent_launch(pdl),
            enable_fp_fusion=False,
            **tile,
        )
