"""Distances between packed latents: hamming_distance, hamming_topk."""

import torch
from torch import Tensor

from .. import checks


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of differing bits of each pair of samples.

    Args:
        a: uint8 (B, ..., P).
        b: like a, or one sample (1, ..., P) to compare with all.

    Returns: int32 (B,).
    """
    checks.packed("a", a, min_dim=1)
    checks.packed("b", b, min_dim=1)
    checks.same_device("b", b, "a", a)
    if tuple(b.shape[1:]) != tuple(a.shape[1:]) or b.shape[0] not in (1, a.shape[0]):
        raise ValueError(f"b: expected shape {tuple(a.shape)} like a, or one sample of it, got {tuple(b.shape)}")
    return torch.ops.bldm.hamming_distance(a, b)


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k samples of `database` nearest to each query in Hamming distance.

    Args:
        queries: uint8 (Q, ..., P).
        database: uint8 (M, ..., P) of the same sample shape.
        k: 1 <= k <= M.

    Returns: distances int32 (Q, k) ascending and indices int64 (Q, k); equal distances come in order of index.
    """
    checks.packed("queries", queries)
    checks.packed("database", database)
    checks.same_device("database", database, "queries", queries)
    checks.shape("database", database, (database.shape[0], *queries.shape[1:]), "samples shaped like the queries")
    k = checks.integer("k", k, 1, database.shape[0])
    return torch.ops.bldm.hamming_topk(queries, database, k)
