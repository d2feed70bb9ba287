"""The cheap test that decides nearly all bits, for kernels that draw many.

With h the 16-bit lane of a bit and d = D 2^-16, the definition sets a bit for sure if N >= (h + 1 + 2^-20) d and clears it
for sure if N <= h d. The estimate s = (h + 1/2) d - N decides it by its sign wherever |s| > (1/2 + error) d. That is not so
for one bit in 50,000, which is drawn by the definition (`common.bernoulli`). Errors, in units of d, det = |n1 d0 - n0 d1|:

    0.04 + 0.02 |P|         d rounded, times h; d / 2 - N rounded, and its coefficients; N and D of the definition; 2^-20
    2^-5 det / (d0 d01) e   exp2 of the device (2^-22) against the definition's (1.1e-7), together taken as 2^-19;
                            |dP / d log e| <= det / (4 d0 d01)
    2^-48 det / d01^2       e below 2^-64, where the definition's stops

Where |P| > 2 the terms in |P| are far below |s| itself, so the margin is 0.625 + the terms in det.
"""

import triton
import triton.language as tl

from .common import fma, random_cube

# A lane h enters as the bits of a float, the subnormal h 2^-149, which saves its conversion; and s carries a factor 2^-72,
# which keeps d finite for e up to 2^64.
_D_SCALE = tl.constexpr(2.0 ** (149 - 16 - 72))
_N_SCALE = tl.constexpr(2.0**-72)
_LIMIT_SCALE = tl.constexpr(2.0 ** (-16 - 72))
_HALF_LANE = tl.constexpr(2.0**-17)


@triton.jit
def step_filter(n0, n1, d0, d1):
    """d, d / 2 - N and the limit of |s|, as lines in e (see `line`), of a step with N = n0 e + n0 + n1, D = d0 e + d0 + d1."""
    n1, d1 = n0 + n1, d0 + d1
    # Coefficients of another kind, which may overflow or vanish, get an infinite limit: no bit is sure.
    regular = (tl.minimum(d0, d1) > 2.0**-30) & (tl.maximum(d0, d1) < 4.0)
    slope = tl.abs(n1 * d0 - n0 * d1) / tl.where(regular, d1, 1.0)
    margin = 0.625 + slope * (1.0625 * 2.0**-5 / tl.where(regular, d0, 1.0) + 1.0625 * 2.0**-48 / tl.where(regular, d1, 1.0))
    limit0 = tl.where(regular, margin * d0 * _LIMIT_SCALE, 0.0)
    limit1 = tl.where(regular, margin * d1 * _LIMIT_SCALE, float("inf"))
    half0, half1 = (d0 * _HALF_LANE - n0) * _N_SCALE, (d1 * _HALF_LANE - n1) * _N_SCALE
    return (d0 * _D_SCALE, d1 * _D_SCALE), (half0, half1), (limit0, limit1)


@triton.jit
def noise_filter(p):
    """The same for N = p, D = 1, which don't depend on e; all times 2^66 in order that 2^149 d is finite."""
    return 2.0**127, (p - _HALF_LANE) * -(2.0**-6), 0.625 * 2.0**-22


@triton.jit
def line(coefficients, e):
    return fma(coefficients[0], e, coefficients[1])


@triton.jit
def cube(x):
    """[N, 8] to [N, 2, 2, 2]."""
    return tl.reshape(x, (x.shape[0], 2, 2, 2))


@triton.jit
def _octet(x):
    """[N, 2, 2, 2] to eight [N]: number 4 a + 2 b + c is x[:, a, b, c]."""
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def quick_bits(d, minus_n, limit, PURPOSE: tl.constexpr, seed, step, sample, byte):
    """[N] uint8 bits and [N] whether all eight are sure; d, d / 2 - N and the limit are scalars, [N, 1, 1, 1] or [N, 2, 2, 2]."""
    lanes = random_cube(PURPOSE, seed, step, sample, byte)
    s = fma(lanes.to(tl.float32, bitcast=True), d, minus_n)
    signs = _octet(s.to(tl.int32, bitcast=True))
    sure = _octet((limit - tl.abs(s)).to(tl.int32, bitcast=True))  # negative where |s| > limit
    bits, all_sure = signs[7], sure[7]  # the last eight sign bits shifted in remain
    for j in tl.static_range(8):
        bits = (bits << 1) | (signs[7 - j] >> 31 & 1)
        all_sure &= sure[j]
    return bits.to(tl.uint8), all_sure < 0
