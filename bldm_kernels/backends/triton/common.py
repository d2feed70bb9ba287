"""What every Triton kernel shares: the tile of packed bytes, the random stream, and its arithmetic.

A program works on N packed bytes of one or more samples, [N], or on their bits, [N, 8]. The arithmetic is that of
docs/random-stream.md to the last bit, so the kernels that draw bits from logits are launched without fusion of a multiply
and an add (`enable_fp_fusion=False`): these stay two roundings unless `fma` says otherwise.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import (
    EXP2_COEFFICIENTS,
    PURPOSE_ADD_NOISE,
    PURPOSE_BINARIZE,
    PURPOSE_FLIP_STEP,
    PURPOSE_RANDOM_BITS,
    STEP_BITS,
)

# Packed bytes a program; more in the interpreter, whose cost is by the operation rather than by the element.
BLOCK = 2048 if triton.knobs.runtime.interpret else 512
NUM_WARPS = 4
# Values that change from call to call must not become part of a compiled kernel.
NOT_SPECIALIZED = ["seed", "step", "sample_offset", "num_samples"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
ADD_NOISE, BINARIZE = tl.constexpr(PURPOSE_ADD_NOISE), tl.constexpr(PURPOSE_BINARIZE)
FLIP_STEP, RANDOM_BITS = tl.constexpr(PURPOSE_FLIP_STEP), tl.constexpr(PURPOSE_RANDOM_BITS)
_STEP_BITS = tl.constexpr(STEP_BITS)
_C1, _C2, _C3, _C4, _C5 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)
# 1.5 * 2^23: adding it to |y| <= 64 rounds y to the nearest integer, ties to even, and leaves that in the low bits.
_ROUND = tl.constexpr(1.5 * 2**23)


# --- launching -------------------------------------------------------------------------------------------------------
def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current, so that a kernel is launched on that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Triton has functions for these two, which take several microseconds a call outside of a kernel.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def byte_grid(num_samples: int, sample_bytes: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the tile of SAMPLES x BYTES = BLOCK packed bytes of every program (see `byte_tile`)."""
    num_bytes = min(next_power_of_2(sample_bytes), BLOCK)
    samples = BLOCK // num_bytes
    grid = ceil_div(num_samples, samples) * ceil_div(sample_bytes, num_bytes)
    return (grid,), {"SAMPLES": samples, "BYTES": num_bytes, "num_warps": NUM_WARPS}


def exp2_scale(temperature: float) -> float:
    return -math.log2(math.e) / temperature


# --- tiles -----------------------------------------------------------------------------------------------------------
@triton.jit
def byte_tile(num_samples, sample_bytes, SAMPLES: tl.constexpr, BYTES: tl.constexpr):
    """Of every byte of the program: its sample, its index within the sample (both int64), and whether it exists."""
    blocks = tl.cdiv(sample_bytes, BYTES)
    program = tl.program_id(0)
    i = tl.arange(0, SAMPLES * BYTES)
    sample = (program // blocks).to(tl.int64) * SAMPLES + i // BYTES
    byte = (program % blocks).to(tl.int64) * BYTES + i % BYTES
    return sample, byte, (sample < num_samples) & (byte < sample_bytes)


@triton.jit
def bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES: tl.constexpr):
    """[N, 8]: where the bits of the bytes lie in a (B, R, C) tensor, and which exist. WHOLE_BYTES: 8 divides C."""
    lane = tl.arange(0, 8)[None, :]
    if WHOLE_BYTES:
        offsets = ((sample * sample_bytes + byte) * 8)[:, None] + lane
        valid = exists[:, None] & (lane < 8)
    else:
        row = byte.to(tl.uint32) // tl.cast(row_bytes, tl.uint32)  # in 32 bits, as a sample has at most 2^32 bytes
        channel = ((byte - row * row_bytes) * 8)[:, None] + lane
        rows = sample_bytes // row_bytes
        offsets = ((sample * rows + row) * num_bits)[:, None] + channel
        valid = exists[:, None] & (channel < num_bits)
    return offsets, valid


@triton.jit
def pack(bits):
    """[N, 8] bool -> [N] uint8."""
    return tl.sum(tl.where(bits, 1 << tl.arange(0, 8)[None, :], 0), axis=1).to(tl.uint8)


@triton.jit
def unpack(packed):
    """[N] uint8 -> [N, 8] int32, 0 or 1."""
    return (packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def mask_padding(packed, byte, row_bytes, num_bits, WHOLE_BYTES: tl.constexpr):
    """[N] bytes with the bits of channels C and above cleared."""
    if not WHOLE_BYTES:
        left = num_bits - (byte.to(tl.uint32) % tl.cast(row_bytes, tl.uint32)).to(tl.int32) * 8
        packed = packed & ((1 << tl.minimum(left, 8)) - 1).to(tl.uint8)
    return packed


@triton.jit
def load_coefficients(coefficients, sample, exists, PER_SAMPLE: tl.constexpr):
    """n0, n1, d0, d1: [N, 1] where every sample has its own, else scalars."""
    if PER_SAMPLE:
        row = (coefficients + sample * 4)[:, None]
        mask = exists[:, None]
        return (
            tl.load(row, mask, 1.0),
            tl.load(row + 1, mask, 1.0),
            tl.load(row + 2, mask, 1.0),
            tl.load(row + 3, mask, 1.0),
        )
    else:
        return tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2), tl.load(coefficients + 3)


@triton.jit
def store_rounded(pointers, values, mask):
    """Store float32 values in the pointers' dtype, to nearest even (Triton's interpreter truncates to bfloat16)."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask)


# --- the random stream -----------------------------------------------------------------------------------------------
@triton.jit
def value_or_load(value, pointer):
    """A seed, step or sample offset in int64: read from the device where there is a pointer."""
    if pointer is None:
        return tl.cast(value, tl.int64)
    else:
        return tl.load(pointer)


@triton.jit
def _mulhilo(A: tl.constexpr, x):
    """High and low word of a 64-bit product, which is one instruction on a GPU."""
    product = x.to(tl.uint64) * A
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_words(PURPOSE: tl.constexpr, seed, step, sample, byte):
    """[N] x 4 uint32: the Philox4x32-10 block of every packed byte."""
    draw = (step + (PURPOSE << _STEP_BITS)).to(tl.uint32)
    c0, c1, c2, c3 = byte.to(tl.uint32), draw, sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _mulhilo(0xD2511F53, c0)
        high1, low1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_cube(PURPOSE: tl.constexpr, seed, step, sample, byte):
    """[N, 2, 2, 2] uint32: the eight 16-bit lanes of every packed byte, lane 4 a + 2 b + c at [a, b, c]."""
    w0, w1, w2, w3 = random_words(PURPOSE, seed, step, sample, byte)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def random_lanes(PURPOSE: tl.constexpr, seed, step, sample, byte):
    """[N, 8] uint32: the eight 16-bit lanes of every packed byte."""
    return tl.reshape(random_cube(PURPOSE, seed, step, sample, byte), (byte.shape[0], 8))


@triton.jit
def any_of(bits):
    """Whether any of [N, 8] bool is set, as a scalar."""
    return tl.max(tl.max(bits.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def fma(a, b, c):
    """a * b + c in float32, rounded once. The interpreter's own fma rounds twice, so there it goes through float64."""
    if INTERPRETED:
        return (tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def exp_neg(logits, scale):
    """exp(-logits / temperature) with scale = -log2(e) / temperature, clamped to 2^-64..2^64."""
    return exp2_clamped(logits * scale)


@triton.jit
def exp2_clamped(y):
    """2^y, clamped to 2^-64..2^64: the exponential of the random stream."""
    y = tl.minimum(tl.maximum(y, -64.0), 64.0)
    shifted = y + _ROUND
    z = y - (shifted - _ROUND)
    p = fma(fma(fma(fma(fma(_C5, z, _C4), z, _C3), z, _C2), z, _C1), z, 1.0)
    # p lies in (0.7, 1.42), so adding n to its exponent is the exact product p 2^n.
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def bernoulli(numerator, minus_unit, PURPOSE: tl.constexpr, seed, step, sample, byte):
    """[N] uint8: bits set with probability numerator / denominator, [N, 8] each; minus_unit = -denominator 2^-16."""
    lanes = random_lanes(PURPOSE, seed, step, sample, byte).to(tl.float32)
    remainder = fma(lanes, minus_unit, numerator)
    bits = pack(remainder > 0)
    if any_of((remainder > 0) & (remainder < tl.abs(minus_unit))):  # a tie, one bit in 65,536: the lower half decides
        lanes = random_lanes(PURPOSE + 1, seed, step, sample, byte).to(tl.float32)
        bits = pack(fma(lanes, minus_unit * 2.0**-16, remainder) > 0)
    return bits
