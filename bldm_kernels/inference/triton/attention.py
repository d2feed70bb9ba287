"""softmax(q k^T / sqrt(d)) v of every sample and head, for tokens that are a few more than a multiple of a tile.

257 tokens are 4 blocks of 64 and one token more. A whole tile for the query of that one would cost a quarter more of everything;
so it gets a program that does without matrix products, or with the smallest tile that tensor cores take, and its key a block that
is.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.triton.common import ceil_div, next_power_of_2, on_device
from .common import dependent_launch, product, rounded, store_scaled

MANY_HEADS = 48  # from which on there are enough of them for large tiles to fill a GPU
SMALL = tl.constexpr(16)  # rows of the smallest tile
MOST_IN_REGISTERS = 256 * 64  # keys times dim, that a program holds


@triton.jit
def _load(base, tokens, num_tokens, row_stride, DIM: tl.constexpr):
    """[tokens, DIM] of q, k or v; 0 where there is no token."""
    at = base + tokens[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    return tl.load(at, tokens[:, None] < num_tokens, 0.0)


@triton.jit
def _block(tiles, base, sample, first, column, num_tokens, row_stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The same of ROWS tokens from `first` on; through TMA where there are descriptors, else from `base`."""
    if tiles is None:
        return _load(base, first + tl.arange(0, ROWS), num_tokens, row_stride, DIM)
    else:
        return tiles.load([sample, first, column]).reshape((ROWS, DIM))


@triton.jit
def _hidden(key_mask, keys, num_tokens):
    """What is added to the scores of the keys: 0, or -infinity where there is no key, or none to attend to."""
    seen = keys < num_tokens
    if key_mask is not None:
        seen &= tl.load(key_mask + keys, seen, 0) != 0
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def _absorb(q, k, v, hidden, exp2_scale, top, total, mixed):
    """A block of keys more: the largest exponent so far, the sum of exponentials and the mixed values relative to it."""
    scores = product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if hidden is not None:
        scores += hidden[None, :]
    new_top = tl.maximum(top, tl.max(scores, axis=1) * exp2_scale)
    if hidden is not None:  # as long as no key is seen, exponents are relative to 0
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        reference = new_top
    p, shrink = tl.exp2(scores * exp2_scale - reference[:, None]), tl.exp2(top - reference)
    return new_top, total * shrink + tl.sum(p, axis=1), product(rounded(p, v.dtype), v, mixed * shrink[:, None])


@triton.jit
def _tile(
    query_tiles,
    key_tiles,
    base,
    sample,
    column,
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
    stride = 3 * width
    q = _block(query_tiles, base, sample, first, column, num_tokens, stride, BLOCK_M, DIM)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, DIM), tl.float32)
    last = BLOCKS * BLOCK_N + tl.arange(0, SMALL)
    if TAIL:  # on its way while the blocks are worked on
        k_last, v_last = (
            _load(base + width, last, num_tokens, stride, DIM),
            _load(base + 2 * width, last, num_tokens, stride, DIM),
        )
    for block in range(BLOCKS):
        key = block * BLOCK_N
        k = _block(key_tiles, base + width, sample, key, column + width, num_tokens, stride, BLOCK_N, DIM)
        v = _block(key_tiles, base + 2 * width, sample, key, column + 2 * width, num_tokens, stride, BLOCK_N, DIM)
        if TAIL and key_mask is None:
            top, total, mixed = _absorb(q, k, v, None, exp2_scale, top, total, mixed)
        else:  # without a tail, the last block may be in part beyond the keys
            hidden = _hidden(key_mask, key + tl.arange(0, BLOCK_N), num_tokens)
            top, total, mixed = _absorb(q, k, v, hidden, exp2_scale, top, total, mixed)
    if TAIL:
        hidden = _hidden(key_mask, last, num_tokens)
        top, total, mixed = _absorb(q, k_last, v_last, hidden, exp2_scale, top, total, mixed)
    rows = (first + tl.arange(0, BLOCK_M))[:, None]
    store_scaled(result + rows * width + tl.arange(0, DIM)[None, :], mixed * (1.0 / total)[:, None], rows < num_tokens, out_scale)


@triton.jit
def _row(base, key_mask, out_scale, result, width, exp2_scale, DIM: tl.constexpr, KEYS: tl.constexpr):
    """The query of token KEYS, the last, to all keys at once."""
    stride = 3 * width
    column = tl.arange(0, DIM)
    at = base + KEYS * stride + column
    q = tl.load(at).to(tl.float32) * exp2_scale
    k_last, v_last = tl.load(at + width).to(tl.float32), tl.load(at + 2 * width).to(tl.float32)
    keys = tl.arange(0, KEYS)
    block = base + keys[:, None] * stride + column[None, :]
    k, v = tl.load(block + width).to(tl.float32), tl.load(block + 2 * width).to(tl.float32)
    scores, score = tl.sum(k * q[None, :], axis=1), tl.sum(q * k_last, axis=0)
    if key_mask is not None:
        scores += _hidden(key_mask, keys, KEYS + 1)
        score += tl.where(tl.load(key_mask + KEYS) != 0, 0.0, float("-inf"))
    top = tl.maximum(tl.max(scores, axis=0), score)  # of a key that is seen
    p, p_last = tl.exp2(scores - top), tl.exp2(score - top)
    mixed = tl.sum(v * p[:, None], axis=0) + v_last * p_last
    store_scaled(result + KEYS * width + column, mixed * (1.0 / (tl.sum(p, axis=0) + p_last)), column < DIM, out_scale)


@triton.jit
def attend(
    query_tiles,
    key_tiles,
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
    ROW: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILES tiles of BLOCK_M queries of every head, and with TAIL a program for the rest, with ROW for one query; to the keys, in
    BLOCKS blocks of BLOCK_N and a small one, with a running maximum (Dao et al. 2022)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    width = num_heads * DIM
    programs: tl.constexpr = TILES + TAIL
    head, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    sample, column = head // num_heads, head % num_heads * DIM
    base = qkv + sample.to(tl.int64) * num_tokens * (3 * width) + column
    result = out + sample.to(tl.int64) * num_tokens * width + column
    if key_mask is not None:
        key_mask += sample.to(tl.int64) * num_tokens
    first = tile * BLOCK_M
    if not TAIL or tile < TILES:
        _tile(
            query_tiles,
            key_tiles,
            base,
            sample,
            column,
            key_mask,
            out_scale,
            result,
            first,
            num_tokens,
            width,
            exp2_scale,
            DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCKS,
            TAIL,
        )
    elif ROW:
        _row(base, key_mask, out_scale, result, width, exp2_scale, DIM, BLOCKS * BLOCK_N)
    else:
        _tile(
            None,
            None,
            base,
            sample,
            column,
            key_mask,
            out_scale,
            result,
            first,
            num_tokens,
            width,
            exp2_scale,
            DIM,
            SMALL,
            BLOCK_N,
            BLOCKS,
            TAIL,
        )


def configuration(num_samples: int, num_tokens: int, num_heads: int, dim: int) -> dict[str, int]:
    """Constants of the kernel: large tiles where there are enough heads to fill a GPU, small ones where there are not."""
    many = num_samples * num_heads >= MANY_HEADS
    if many:
        block_m, block_n, tile = 64, 64, {"num_warps": 4, "num_stages": 2}
    else:
        block_m, block_n = 32, min(max(next_power_of_2(num_tokens // 2 + 1), 64), 256 * 64 // dim)
        tile = {"num_warps": 4, "num_stages": 1 if num_tokens <= block_n + SMALL.value else 2}
    rest = num_tokens % max(block_m, block_n)
    tail = 0 < rest <= SMALL.value
    tiled = num_tokens - rest if tail else num_tokens
    in_registers = tiled == next_power_of_2(tiled) and tiled * dim <= MOST_IN_REGISTERS
    tile |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "TAIL": int(tail), "ROW": int(many and rest == 1 and in_registers)}
    return tile | {"TILES": ceil_div(tiled, block_m), "BLOCKS": ceil_div(tiled, block_n)}


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None, out_scale: Tensor | None, pdl: bool, out: Tensor) -> None:
    num_samples, num_tokens, width = out.shape
    dim = width // num_heads
    tile = configuration(num_samples, num_tokens, num_heads, dim)
    grid = (num_samples * num_heads * (tile["TILES"] + tile["TAIL"]),)
    scale = math.log2(math.e) / math.sqrt(dim)
    # small tiles gain nothing by TMA, which wants aligned memory
    through_tma = num_samples * num_heads >= MANY_HEADS and qkv.data_ptr() % 16 == 0

    def tiles(rows: int) -> TensorDescriptor | None:
        return TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), [1, rows, dim]) if through_tma else None

    with on_device(qkv):
        attend[grid](
            tiles(tile["BLOCK_M"]),
            tiles(tile["BLOCK_N"]),
            qkv,
            key_mask,
            out_scale,
            out,
            num_tokens,
            num_heads,
            scale,
            DIM=dim,
            **dependent_launch(pdl),
            **tile,
        )
