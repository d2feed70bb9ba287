"""hamming_topk for many queries: a search that writes down few of the distances.

The database is gone through in parts. Of the first part every pair is kept, then only pairs nearer than the k-th best of their
query so far: of shuffled samples that is a handful. Later rows lose ties, so "nearer" is strict. Keys are distance 2^32 + index:
they order as the promised (distance, index) does, whatever the order in which they were found.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_KEYS = 2**26  # held at a time, 8 bytes each
FIRST_PART = 2**11  # rows; every part has GROWTH times as many as the one before
GROWTH = 8
ROOM = 2**15  # rows that a part may have whatever the number of queries
ALIGNMENT = 16  # bytes, of rows and their lengths


class Kernels(NamedTuple):
    """count_bits(rows (n, bytes), out (n,)): set bits of each row.
    candidates(queries, rows, query_bits, first_row, keys, counts, limits): appends to keys (Q, capacity) the pairs
    with a distance below limits (Q,), as many as counts (Q,) says in the end.
    select(keys, k, max_distance, counts, limits): where there are more than k keys, keeps the k smallest, in any order, and
    sets the limit to the largest of their distances."""

    count_bits: Callable[[Tensor, Tensor], None]
    candidates: Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]
    select: Callable[[Tensor, int, int, Tensor, Tensor], None]


def search(kernels: Kernels, queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
    """The k nearest of database (M, n) to each of queries (Q, n), into distances and indices (Q, k)."""
    queries = _aligned(queries)
    capacity = min(len(database), max(k + ROOM, MAX_KEYS // len(queries)))
    tile = max(1, MAX_KEYS // capacity)
    for q in range(0, len(queries), tile):
        nearest = _search(kernels, queries[q : q + tile], database, k, capacity)
        distances[q : q + tile] = nearest >> 32
        indices[q : q + tile] = nearest & 0xFFFFFFFF


def _search(kernels: Kernels, queries: Tensor, database: Tensor, k: int, capacity: int) -> Tensor:
    """The keys of the k nearest, (Q, k) int64 in ascending order."""
    query_bits = torch.empty(len(queries), dtype=torch.int32, device=queries.device)
    kernels.count_bits(queries, query_bits)
    keys = torch.empty(len(queries), capacity, dtype=torch.int64, device=queries.device)
    counts = torch.zeros_like(query_bits)
    limits = torch.full_like(query_bits, torch.iinfo(torch.int32).max)
    most = capacity - k if capacity < len(database) else capacity
    first, size = 0, max(FIRST_PART, GROWTH * k)
    while first < len(database):
        size = min(size, most, len(database) - first)
        rows = _aligned(database[first : first + size])
        kernels.candidates(queries, rows, query_bits, first, keys, counts, limits)
        kernels.select(keys, k, 8 * queries.shape[1], counts, limits)
        first, size = first + size, size * GROWTH
    return keys[:, :k].sort().values


def _aligned(rows: Tensor) -> Tensor:
    """Rows that begin and end at a multiple of 16 bytes: a copy with zeros behind where they don't."""
    missing = -rows.shape[1] % ALIGNMENT
    return rows if missing == 0 and rows.data_ptr() % ALIGNMENT == 0 else F.pad(rows, (0, missing))
