"""ResidentLatents: a whole store in the memory of a device."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bldm_kernels import checks

from .nearest import nearest

if TYPE_CHECKING:
    from .reader import LatentStore
    from .stream import LatentStream


class ResidentLatents:
    """All samples of a store on one device (ImageNet at 16 x 16 x 64 bits is 2.6 GB); see `LatentStore.to`.

    `resident[indices]` gathers a batch on the device, without a synchronisation when the indices are there already.

    Attributes: `tensors`, every column whole: {"packed": uint8 (N, *latent_shape[:-1], P), ...}; `latent_shape`; `metadata`.
    """

    def __init__(self, tensors: dict[str, Tensor], latent_shape: tuple[int, ...], metadata: dict[str, Any], per_shard: int):
        self.tensors, self.latent_shape, self.metadata = tensors, latent_shape, metadata
        self.samples_per_shard = per_shard
        self.available = torch.arange(len(self))

    @classmethod
    def load(cls, store: "LatentStore", device: torch.device | str) -> "ResidentLatents":
        if store.damage:
            raise ValueError(f"store: {store.damage[0]}; only a whole store can be made resident")
        fields = store.index.layout.fields
        tensors = {n: torch.empty(len(store), *c.shape, dtype=c.dtype, device=device) for n, c in fields.items()}
        for start, batch in store.shards():
            for name, value in batch.items():
                tensors[name][start : start + len(value)].copy_(value)
        return cls(tensors, store.latent_shape, store.metadata, store.samples_per_shard)

    @property
    def device(self) -> torch.device:
        return self.tensors["packed"].device

    def __len__(self) -> int:
        return len(self.tensors["packed"])

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: int64 (B,) indices from 0 on, on any device -> the samples, on this one."""
        checks.tensor("indices", indices, (torch.int64,))
        if indices.dim() != 1:
            raise ValueError(f"indices: expected one dimension, got shape {tuple(indices.shape)}")
        where = indices.to(self.device)
        return {name: value.index_select(0, where) for name, value in self.tensors.items()}

    def stream(self, batch_size: int, **options: Any) -> "LatentStream":
        """Batches on the device, in the same order as those of the store it came from: see `LatentStream`."""
        from .stream import LatentStream

        return LatentStream(self, batch_size, **options)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `LatentStore.nearest`."""
        checks.integer("k", k, 1, len(self))
        return nearest(queries, [(0, self.tensors["packed"])], k)

    def __repr__(self) -> str:
        return f"ResidentLatents({len(self)} x {self.latent_shape} bits, {self.device})"
