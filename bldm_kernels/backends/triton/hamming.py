"""hamming_distance, hamming_topk."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..search import Kernels, search
from .common import INTERPRETED, NUM_WARPS, on_device

ROWS = 32  # samples a program, of `row_distances` and of the database
QUERIES = 8  # queries a program
WORDS = 64  # 32-bit words of a sample read at a time, shared out among the queries
MAX_CHUNK = 2**21  # database samples a pass
FEW_QUERIES = 28  # up to here a key for every pair and torch.topk take less time than the search
TILE_QUERIES, TILE_ROWS, TILE_BYTES, TILE_WARPS, TILE_STAGES = 128, 128, 128, 8, 2  # of the search
BLOCK = 1024  # keys at a time


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


@triton.jit
def lowest_bits(x):
    """The lowest bit of every byte, as int8 0 or 1, and the bytes with the next one lowest (up to seven times)."""
    if INTERPRETED:
        return (x & 1).to(tl.int8), x >> 1
    else:  # four bytes an instruction
        return tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x01010101; shr.b32 $1, $2, 1;",
            "=r,=r,r",
            [x],
            dtype=(tl.int8, tl.uint8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def near_pairs(
    queries,
    database,
    query_bits,
    row_bits,
    keys,
    counts,
    limits,
    num_queries,
    num_rows,
    num_bytes,
    first_row,
    capacity,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Appends to keys the pairs with a distance below the query's limit: popc(a ^ b) = popc(a) + popc(b) - 2 popc(a & b), the
    last as the sum of the integer products of the eight bit planes."""
    query_tiles = tl.cdiv(num_queries, QUERIES)
    query = tl.program_id(0) % query_tiles * QUERIES + tl.arange(0, QUERIES)
    row = tl.program_id(0) // query_tiles * ROWS + tl.arange(0, ROWS)
    q_at = queries + query.to(tl.int64)[:, None] * num_bytes
    r_at = database + row.to(tl.int64)[None, :] * num_bytes
    common = tl.zeros((QUERIES, ROWS), tl.int32)
    for step in range(STEPS):
        byte = step * BYTES + tl.arange(0, BYTES)
        q = tl.load(q_at + byte[None, :], (query < num_queries)[:, None] & (byte < num_bytes)[None, :], 0)
        r = tl.load(r_at + byte[:, None], (row < num_rows)[None, :] & (byte < num_bytes)[:, None], 0)
        for _ in tl.static_range(8):
            q_bits, q = lowest_bits(q)
            r_bits, r = lowest_bits(r)
            common = tl.dot(q_bits, r_bits, common, out_dtype=tl.int32)
    bits = tl.load(query_bits + query, query < num_queries, 0)[:, None] + tl.load(row_bits + row, row < num_rows, 0)[None, :]
    distance = bits - 2 * common
    limit = tl.load(limits + query, query < num_queries, 0)[:, None]
    near = (distance < limit) & (row < num_rows)[None, :]
    query = query[:, None] + tl.zeros_like(distance)
    place = tl.atomic_add(counts + query, 1, near, sem="relaxed")
    key = (distance.to(tl.int64) << 32) | (first_row + row)[None, :]
    tl.store(keys + query.to(tl.int64) * capacity + place, key, near)


@triton.jit
def keep_nearest(keys, counts, limits, capacity, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One query: finds its k-th smallest key bit by bit, moves the keys up to it to the front."""
    query = tl.program_id(0).to(tl.int64)
    keys += query * capacity
    count = tl.load(counts + query)
    if count > k:
        kth = query * 0
        for bit in range(BITS):
            higher = kth | (tl.full((), 1, tl.int64) << (BITS - 1 - bit))
            below, first = count * 0, count * 0
            while first < count:
                at = first + tl.arange(0, BLOCK)
                first += BLOCK
                below += tl.sum((tl.load(keys + at, at < count, higher) < higher).to(tl.int32))
            kth = tl.where(below < k, higher, kth)
        kept, first = count * 0, count * 0
        while first < count:
            at = first + tl.arange(0, BLOCK)
            first += BLOCK
            key = tl.load(keys + at, at < count, kth + 1)
            tl.debug_barrier()  # read before others write here
            near = (key <= kth).to(tl.int32)
            tl.store(keys + kept + tl.cumsum(near, 0) - 1, key, near > 0)
            kept += tl.sum(near)
        tl.store(counts + query, k)
        tl.store(limits + query, (kth >> 32).to(tl.int32))


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
    if len(queries) > FEW_QUERIES:
        kernels = Kernels(lambda rows, out: set_bits(rows, None, out), _candidates, _select)
        return search(kernels, queries, database, k, distances, indices)
    size = database.shape[0]
    queries, database = _words(queries, database)
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for first in range(0, size, MAX_CHUNK):
        keys = _keys(queries, database, first, min(MAX_CHUNK, size - first))
        nearest = torch.topk(keys, min(k, keys.shape[1]), largest=False).values
        best = torch.cat([best, nearest], dim=1)
        best = torch.topk(best, min(k, best.shape[1]), largest=False).values
    distances.copy_(best // size)
    indices.copy_(best % size)


def _candidates(
    queries: Tensor,
    rows: Tensor,
    query_bits: Tensor,
    first_row: int,
    keys: Tensor,
    counts: Tensor,
    limits: Tensor,
) -> None:
    row_bits = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    set_bits(rows, None, row_bits)
    grid = (triton.cdiv(len(queries), TILE_QUERIES) * triton.cdiv(len(rows), TILE_ROWS),)
    with on_device(queries):
        near_pairs[grid](
            queries,
            rows,
            query_bits,
            row_bits,
            keys,
            counts,
            limits,
            *(len(queries), *rows.shape),
            first_row,
            keys.shape[1],
            QUERIES=TILE_QUERIES,
            ROWS=TILE_ROWS,
            BYTES=TILE_BYTES,
            STEPS=triton.cdiv(rows.shape[1], TILE_BYTES),
            num_warps=TILE_WARPS,
            num_stages=TILE_STAGES,
        )


def _select(keys: Tensor, k: int, max_distance: int, counts: Tensor, limits: Tensor) -> None:
    with on_device(keys):
        keep_nearest[(len(keys),)](
            keys,
            counts,
            limits,
            keys.shape[1],
            k,
            BITS=32 + max_distance.bit_length(),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=1,  # the second loop writes what it has read: no loads ahead
        )


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
