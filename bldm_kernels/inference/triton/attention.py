"""softmax(q k^T) v of one sample and head, for tokens that are a few more than a power of two.

257 tokens are 4 blocks of 64 keys and one token more, whose key is a rank-1 update.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from ...backends.triton.common import ceil_div, next_power_of_2, on_device
from .common import dependent_launch, product, rounded, store_scaled

RESIDENT = 256 * 64  # elements of K, or V, of a head that are taken at once
MANY_HEADS = 48  # from which on there are enough of them for large tiles to fill a GPU
MAX_TAIL = 4  # keys that are not worth a block


@triton.jit
def _hidden(key_mask, keys, num_tokens):
    """What is added to the scores of the keys: 0, or -infinity where there is no key, or none to attend to."""
    seen = keys < num_tokens
    if key_mask is not None:
        seen &= tl.load(key_mask + keys, seen, 0) != 0
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def _vectors(base, token, row_stride, width, columns, key_mask, exp2_scale):
    """Of one token: key, times the scale of the exponent; value; and what is added to its scores."""
    at = base + token * row_stride + columns
    k, v = tl.load(at + width).to(tl.float32) * exp2_scale, tl.load(at + 2 * width).to(tl.float32)
    hidden = 0.0
    if key_mask is not None:
        hidden = tl.where(tl.load(key_mask + token) != 0, 0.0, float("-inf"))
    return k, v, hidden


@triton.jit
def _reference(top, MASKED: tl.constexpr):
    """What exponents are relative to: the largest so far, or 0 where no key has been seen."""
    if MASKED:
        return tl.where(top == float("-inf"), 0.0, top)
    else:
        return top


@triton.jit
def _absorb(q, k, v, hidden, exp2_scale, top, total, mixed, MASKED: tl.constexpr):
    """A block of keys more: maximum, sum and mixed values of the exponentials, as they are with a running maximum."""
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if MASKED:
        scores += hidden[None, :]
    new_top = tl.maximum(top, tl.max(scores, axis=1) * exp2_scale)
    reference = _reference(new_top, MASKED)
    p, shrink = tl.exp2(scores * exp2_scale - reference[:, None]), tl.exp2(top - reference)
    return new_top, total * shrink + tl.sum(p, axis=1), product(rounded(p, v.dtype), v, mixed * shrink[:, None])


@triton.jit
def _absorb_one(q, k, v, hidden, top, total, mixed, MASKED: tl.constexpr):
    """One key more, by a rank-1 update: q [BLOCK_M, DIM], k and v [DIM] in float32."""
    score = tl.sum(q * k[None, :], axis=1) + hidden
    new_top = tl.maximum(top, score)
    reference = _reference(new_top, MASKED)
    p, shrink = tl.exp2(score - reference), tl.exp2(top - reference)
    return new_top, total * shrink + p, mixed * shrink[:, None] + p[:, None] * v[None, :]


@triton.jit
def resident(
    qkv,
    key_mask,
    out_scale,
    out,
    num_tokens,
    num_heads,
    exp2_scale,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of BLOCK_M queries of a head, all of whose keys are at hand at once: KEYS of them, and TAIL more."""
    if PDL:
        gdc_wait()
    width, row_stride = num_heads * DIM, 3 * num_heads * DIM
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = qkv + sample * num_tokens * row_stride + head * DIM
    result = out + sample * num_tokens * width + head * DIM
    if key_mask is not None:
        key_mask += sample * num_tokens
    MASKED: tl.constexpr = TAIL == 0 or key_mask is not None
    columns = tl.arange(0, DIM)
    keys = tl.arange(0, KEYS)
    at, exists = base + keys[:, None] * row_stride + columns[None, :], keys[:, None] < num_tokens
    k, v = tl.load(at + width, exists, 0.0), tl.load(at + 2 * width, exists, 0.0)
    hidden = _hidden(key_mask, keys, num_tokens)
    if PDL:
        gdc_launch_dependents()

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows[:, None] < num_tokens
    q = tl.load(base + rows[:, None] * row_stride + columns[None, :], inside, 0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, DIM), tl.float32)
    top, total, mixed = _absorb(q, k, v, hidden, exp2_scale, top, total, mixed, MASKED)
    for tail in tl.static_range(TAIL):
        k1, v1, hidden1 = _vectors(base, KEYS + tail, row_stride, width, columns, key_mask, exp2_scale)
        top, total, mixed = _absorb_one(q.to(tl.float32), k1, v1, hidden1, top, total, mixed, MASKED)
    store_scaled(result + rows[:, None] * width + columns[None, :], mixed / total[:, None], inside, out_scale)


@triton.jit
def streaming(
    qkv,
    key_mask,
    out_scale,
    out,
    num_tokens,
    num_heads,
    exp2_scale,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of BLOCK_M queries of a head, to keys that come by in BLOCKS blocks of BLOCK_N, and TAIL more."""
    if PDL:
        gdc_wait()
    width, row_stride = num_heads * DIM, 3 * num_heads * DIM
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = qkv + sample * num_tokens * row_stride + head * DIM
    result = out + sample * num_tokens * width + head * DIM
    if key_mask is not None:
        key_mask += sample * num_tokens
    MASKED: tl.constexpr = TAIL == 0 or key_mask is not None
    columns = tl.arange(0, DIM)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows[:, None] < num_tokens
    q = tl.load(base + rows[:, None] * row_stride + columns[None, :], inside, 0.0)
    if PDL:
        gdc_launch_dependents()
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, DIM), tl.float32)
    for block in range(BLOCKS):
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at, exists = base + keys[:, None] * row_stride + columns[None, :], keys[:, None] < num_tokens
        k, v = tl.load(at + width, exists, 0.0), tl.load(at + 2 * width, exists, 0.0)
        hidden = _hidden(key_mask, keys, num_tokens)
        top, total, mixed = _absorb(q, k, v, hidden, exp2_scale, top, total, mixed, MASKED)
    for tail in tl.static_range(TAIL):
        k1, v1, hidden1 = _vectors(base, BLOCKS * BLOCK_N + tail, row_stride, width, columns, key_mask, exp2_scale)
        top, total, mixed = _absorb_one(q.to(tl.float32), k1, v1, hidden1, top, total, mixed, MASKED)
    store_scaled(result + rows[:, None] * width + columns[None, :], mixed / total[:, None], inside, out_scale)


def configuration(
    num_samples: int, num_tokens: int, num_heads: int, dim: int
) -> tuple[JITFunction, tuple[int, ...], dict[str, int]]:
    """Kernel, grid and constants: large tiles where there are enough heads to fill a GPU, small ones where there are not."""
    power = max(next_power_of_2(num_tokens), 16)
    if num_tokens <= power // 2 + MAX_TAIL:
        power = max(power // 2, 16)
    if power * dim <= RESIDENT and num_samples * num_heads < MANY_HEADS:
        tile = {"BLOCK_M": 32, "KEYS": power, "TAIL": max(num_tokens - power, 0), "num_warps": 4, "num_stages": 1}
        return resident, (ceil_div(num_tokens, 32), num_heads, num_samples), tile
    tail = num_tokens % 64 if num_tokens % 64 <= MAX_TAIL else 0
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCKS": ceil_div(num_tokens - tail, 64), "TAIL": tail}
    return streaming, (ceil_div(num_tokens, 64), num_heads, num_samples), tile | {"num_warps": 4, "num_stages": 3}


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None, out_scale: Tensor | None, pdl: bool, out: Tensor) -> None:
    num_samples, num_tokens, width = out.shape
    dim = width // num_heads
    kernel, grid, constants = configuration(num_samples, num_tokens, num_heads, dim)
    scale = math.log2(math.e) / math.sqrt(dim)
    with on_device(qkv):
        kernel[grid](qkv, key_mask, out_scale, out, num_tokens, num_heads, scale, DIM=dim, **dependent_launch(pdl), **constants)
