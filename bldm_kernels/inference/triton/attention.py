"""softmax(q k^T / sqrt(d)) v of every sample and head, for tokens that are a few more than a multiple of a tile.

257 tokens are 4 blocks of 64 and one token more. A whole tile for the query of that one would cost a quarter more of everything;
so it gets a program whose tile is the smallest that tensor cores take, and its key a block that is.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends.triton.common import ceil_div, next_power_of_2, on_device
from .common import dependent_launch, product, rounded, store_scaled

MANY_HEADS = 48  # from which on there are enough of them for large tiles to fill a GPU
SMALL = tl.constexpr(16)  # rows of the smallest tile


@triton.jit
def _load(base, tokens, num_tokens, row_stride, DIM: tl.constexpr):
    """[tokens, DIM] of q, k or v; 0 where there is no token."""
    at = base + tokens[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    return tl.load(at, tokens[:, None] < num_tokens, 0.0)


@triton.jit
def _absorb(
    q, top, total, mixed, base, key_mask, keys, num_tokens, width, row_stride, exp2_scale, DIM: tl.constexpr, MASKED: tl.constexpr
):
    """A block of keys more: the largest exponent so far, the sum of exponentials and the mixed values relative to it."""
    k = _load(base + width, keys, num_tokens, row_stride, DIM)
    v = _load(base + 2 * width, keys, num_tokens, row_stride, DIM)
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if MASKED:
        seen = keys < num_tokens
        if key_mask is not None:
            seen &= tl.load(key_mask + keys, seen, 0) != 0
        scores += tl.where(seen, 0.0, float("-inf"))[None, :]
    new_top = tl.maximum(top, tl.max(scores, axis=1) * exp2_scale)
    reference = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # 0 as long as no key is seen
    p, shrink = tl.exp2(scores * exp2_scale - reference[:, None]), tl.exp2(top - reference)
    return new_top, total * shrink + tl.sum(p, axis=1), product(rounded(p, v.dtype), v, mixed * shrink[:, None])


@triton.jit
def _tile(
    base,
    key_mask,
    out_scale,
    result,
    first,
    num_tokens,
    width,
    exp2_scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The queries first .. first + BLOCK_M of a head."""
    row_stride = 3 * width
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(base, rows, num_tokens, row_stride, DIM)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, DIM), tl.float32)
    for block in range(BLOCKS):
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        masked: tl.constexpr = not TAIL or key_mask is not None  # without a tail, the last block may be in part beyond the keys
        top, total, mixed = _absorb(
            q, top, total, mixed, base, key_mask, keys, num_tokens, width, row_stride, exp2_scale, DIM, masked
        )
    if TAIL:
        keys = BLOCKS * BLOCK_N + tl.arange(0, SMALL)
        top, total, mixed = _absorb(
            q, top, total, mixed, base, key_mask, keys, num_tokens, width, row_stride, exp2_scale, DIM, True
        )
    at = result + rows[:, None] * width + tl.arange(0, DIM)[None, :]
    store_scaled(at, mixed / total[:, None], rows[:, None] < num_tokens, out_scale)


@triton.jit
def attend(
    qkv,
    key_mask,
    out_scale,
    out,
    num_tokens,
    num_heads,
    exp2_scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILES tiles of BLOCK_M queries of every head, and with TAIL a small one for the rest; to the keys, in BLOCKS blocks of
    BLOCK_N and a small one, with a running maximum (Dao et al. 2022)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    width = num_heads * DIM
    programs: tl.constexpr = TILES + TAIL
    head, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    sample = (head // num_heads).to(tl.int64)
    base = qkv + sample * num_tokens * (3 * width) + head % num_heads * DIM
    result = out + sample * num_tokens * width + head % num_heads * DIM
    if key_mask is not None:
        key_mask += sample * num_tokens
    first = tile * BLOCK_M
    if not TAIL or tile < TILES:
        _tile(base, key_mask, out_scale, result, first, num_tokens, width, exp2_scale, DIM, BLOCK_M, BLOCK_N, BLOCKS, TAIL)
    else:
        _tile(base, key_mask, out_scale, result, first, num_tokens, width, exp2_scale, DIM, SMALL, BLOCK_N, BLOCKS, TAIL)


def configuration(num_samples: int, num_tokens: int, num_heads: int, dim: int) -> dict[str, int]:
    """Constants of the kernel: large tiles where there are enough heads to fill a GPU, small ones where there are not."""
    if num_samples * num_heads >= MANY_HEADS:
        block_m, block_n, tile = 64, 64, {"num_warps": 4, "num_stages": 3}
    else:
        block_m, block_n = 32, min(max(next_power_of_2(num_tokens // 2 + 1), 64), 256 * 64 // dim)
        tile = {"num_warps": 4, "num_stages": 1 if num_tokens <= block_n + SMALL.value else 2}
    rest = num_tokens % max(block_m, block_n)
    tail = 0 < rest <= SMALL.value
    tiled = num_tokens - rest if tail else num_tokens
    tile |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "TAIL": int(tail)}
    return tile | {"TILES": ceil_div(tiled, block_m), "BLOCKS": ceil_div(tiled, block_n)}


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None, out_scale: Tensor | None, pdl: bool, out: Tensor) -> None:
    num_samples, num_tokens, width = out.shape
    dim = width // num_heads
    tile = configuration(num_samples, num_tokens, num_heads, dim)
    grid = (num_samples * num_heads * (tile["TILES"] + tile["TAIL"]),)
    scale = math.log2(math.e) / math.sqrt(dim)
    with on_device(qkv):
        attend[grid](qkv, key_mask, out_scale, out, num_tokens, num_heads, scale, DIM=dim, **dependent_launch(pdl), **tile)
