"""hamming_distance, hamming_topk."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .common import INTERPRETED, NUM_WARPS, on_device

ROWS = 32  # samples a program, of `row_distances` and of the database
QUERIES = 8  # queries a program
WORDS = 64  # 32-bit words of a sample read at a time, shared out among the queries
MAX_KEYS = 2**24  # sort keys held at a time, 8 bytes each
MAX_CHUNK = 2**22  # database samples a pass


@triton.jit
def popcount(x):
    """Number of set bits of every int32 (the interpreter has no libdevice)."""
    if INTERPRETED:
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)
    else:
        return libdevice.popc(x)


@triton.jit
def row_distances(a, b, out, num_rows, num_words, b_stride, ROWS: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr):
    """out[i] = number of set bits of a[i] ^ b[i], or of a[i] alone; b_stride 0: one b for all."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, WORDS), tl.int32)
    for step in range(STEPS):
        word = step * WORDS + tl.arange(0, WORDS)[None, :]
        exists = (row < num_rows) & (word < num_words)
        x = tl.load(a + row * num_words + word, exists, 0)
        if b is not None:
            x ^= tl.load(b + row * b_stride + word, exists, 0)
        total += popcount(x.to(tl.int32))
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(out + rows, tl.sum(total, axis=1), rows < num_rows)


@triton.jit
def distance_keys(
    queries,
    database,
    keys,
    num_queries,
    chunk,
    first,
    database_size,
    num_words,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """keys[q, i] = distance * database_size + index: sorted keys are sorted distances, ties by lower index."""
    query_blocks = tl.cdiv(num_queries, QUERIES)
    q0, i0 = (tl.program_id(0) % query_blocks) * QUERIES, (tl.program_id(0) // query_blocks).to(tl.int64) * ROWS
    row = i0 + tl.arange(0, ROWS)[:, None, None]
    query = q0.to(tl.int64) + tl.arange(0, QUERIES)[None, :, None]
    total = tl.zeros((ROWS, QUERIES, WORDS), tl.int32)
    for step in range(STEPS):
        word = step * WORDS + tl.arange(0, WORDS)[None, None, :]
        x = tl.load(database + (first + row) * num_words + word, (row < chunk) & (word < num_words), 0)
        y = tl.load(queries + query * num_words + word, (query < num_queries) & (word < num_words), 0)
        total += popcount((x ^ y).to(tl.int32))
    i = i0 + tl.arange(0, ROWS)[:, None]
    q = q0.to(tl.int64) + tl.arange(0, QUERIES)[None, :]
    key = tl.sum(total, axis=2).to(tl.int64) * database_size + first + i
    tl.store(keys + q * chunk + i, key, (i < chunk) & (q < num_queries))


def _words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows of bytes seen as 32-bit words where their length and alignment allow."""
    if all(x.shape[1] % 4 == 0 and x.storage_offset() % 4 == 0 and x.data_ptr() % 4 == 0 for x in tensors):
        return tuple(x.view(torch.int32) for x in tensors)
    return tensors


def set_bits(a: Tensor, b: Tensor | None, out: Tensor) -> None:
    """(B, n), None or (B or 1, n) -> (B,) int32: number of set bits of each row of a ^ b, or of a."""
    if b is None:
        (a,) = _words(a)
    else:
        a, b = _words(a, b)
    num_rows, num_words = a.shape
    stride = num_words if b is not None and b.shape[0] > 1 else 0
    grid = (triton.cdiv(num_rows, ROWS),)
    with on_device(a):
        row_distances[grid](
            a,
            b,
            out,
            num_rows,
            num_words,
            stride,
            ROWS=ROWS,
            WORDS=WORDS,
            STEPS=triton.cdiv(num_words, WORDS),
            num_warps=NUM_WARPS,
        )


def hamming_distance(a: Tensor, b: Tensor, out: Tensor) -> None:
    set_bits(a, b, out)


def hamming_topk(queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
    size = database.shape[0]
    queries, database = _words(queries, database)
    chunk = min(size, MAX_CHUNK)
    step = max(1, MAX_KEYS // chunk)
    for q in range(0, queries.shape[0], step):
        some = queries[q : q + step]
        best = torch.empty((some.shape[0], 0), dtype=torch.int64, device=some.device)
        for first in range(0, size, chunk):
            keys = _keys(some, database, first, min(chunk, size - first))
            nearest = torch.topk(keys, min(k, keys.shape[1]), largest=False).values
            best = torch.cat([best, nearest], dim=1)
            best = torch.topk(best, min(k, best.shape[1]), largest=False).values
        distances[q : q + step] = best // size
        indices[q : q + step] = best % size


def _keys(queries: Tensor, database: Tensor, first: int, count: int) -> Tensor:
    """(Q, count) int64 sort keys of the database samples first .. first + count."""
    keys = torch.empty((queries.shape[0], count), dtype=torch.int64, device=queries.device)
    size, num_words = database.shape
    block = min(triton.next_power_of_2(queries.shape[0]), QUERIES)
    words = WORDS // block
    grid = (triton.cdiv(queries.shape[0], block) * triton.cdiv(count, ROWS),)
    with on_device(queries):
        distance_keys[grid](
            queries,
            database,
            keys,
            queries.shape[0],
            count,
            first,
            size,
            num_words,
            ROWS=ROWS,
            QUERIES=block,
            WORDS=words,
            STEPS=triton.cdiv(num_words, words),
            num_warps=NUM_WARPS,
        )
    return keys
