"""Search through latents that come in parts."""

from collections.abc import Iterable

import torch
from torch import Tensor

import bldm_kernels as bk


def nearest(queries: Tensor, parts: Iterable[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """`bk.hamming_topk` over parts (index of the first, packed latents) in ascending order, of k latents at least."""
    distances = torch.empty(len(queries), 0, dtype=torch.int32, device=queries.device)
    indices = distances.long()
    for start, packed in parts:
        found, where = bk.hamming_topk(queries, packed.to(queries.device), min(k, len(packed)))
        # Earlier parts come first, and the sort is stable: equal distances stay in order of index.
        distances, order = torch.cat([distances, found], 1).sort(dim=1, stable=True)
        indices = torch.cat([indices, where + start], 1).gather(1, order)[:, :k]
        distances = distances[:, :k]
    return distances.contiguous(), indices.contiguous()
