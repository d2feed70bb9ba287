"""What the inference kernels share: products and stores in the dtypes of the tensor cores."""

from typing import Any

import triton
import triton.language as tl

from ...backends.triton.common import INTERPRETED, store_rounded

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def product(a, b, total):
    """total + a @ b in float32."""
    if INTERPRETED:  # whose dot knows no bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to bfloat16, to nearest even; the interpreter, which truncates, keeps float32 of the same value."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def saturated(values):
    """float32 values within what e4m3 can hold; in the interpreter, whose conversion truncates, rounded as it rounds."""
    values = tl.minimum(tl.maximum(values, -E4M3_MAX), E4M3_MAX)
    if INTERPRETED:  # to 4 significant bits, or multiples of 2^-9
        bits = values.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        values = tl.where(tl.abs(values) < 2.0**-6, (values + 1.5 * 2.0**14) - 1.5 * 2.0**14, normal)
    return values


@triton.jit
def store_scaled(pointers, values, mask, scale):
    """Store float32 values in bfloat16; or with a scale, a pointer, values / scale in e4m3, saturated."""
    if scale is not None:
        values = saturated(values * (1.0 / tl.load(scale)))  # one division, not one an element
    store_rounded(pointers, values, mask)


def dependent_launch(pdl: bool) -> dict[str, Any]:
    """Arguments of a launch, with programmatic dependent launch or without (the interpreter does not know the option)."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
