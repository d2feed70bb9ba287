"""LatentStream: the samples of a store in batches, epoch after epoch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bldm_kernels import checks

if TYPE_CHECKING:
    from .reader import LatentStore
    from .resident import ResidentLatents


class LatentStream(IterableDataset):
    """Batches of the samples of a store, or of a resident one. Each `for` loop runs through (the rest of) one epoch.

    The order of an epoch depends on the seed and the number of the epoch alone. Step by step, every process takes its own equal
    part of a common batch of `world_size * batch_size` samples: nothing twice, and the common batches are the same for any number
    of processes. What does not divide evenly at the end of an epoch (fewer than `world_size` samples, or with `drop_last` fewer
    than a common batch) is left out of it. Samples of damaged shards are never drawn.

    Args:
        source: a `LatentStore` or `ResidentLatents`.
        batch_size: samples a batch and process.
        shuffle: "full" (a permutation of all samples), "shards" (of the shards, then of the samples of `buffer_shards` shards at
            a time: a store that is larger than the memory is read almost in sequence), or "none".
        seed: of the shuffling.
        rank, world_size: this process and how many there are; by default those of torch.distributed if it runs, else 0 and 1.
        drop_last: every batch has `batch_size` samples.
        buffer_shards: shards that are shuffled together.

    Attributes: `position`, the number of batches drawn so far, counted over all epochs; it may be set.
    """

    def __init__(
        self,
        source: "LatentStore | ResidentLatents",
        batch_size: int,
        *,
        shuffle: str = "full",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
        buffer_shards: int = 4,
    ):
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        self.source = source
        self.batch_size = checks.integer("batch_size", batch_size, 1, 2**40)
        self.shuffle = checks.option("shuffle", shuffle, ("full", "shards", "none"))
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        self.world_size = checks.integer("world_size", world_size, 1, 2**20)
        self.rank = checks.integer("rank", rank, 0, world_size - 1)
        self.drop_last = bool(drop_last)
        self.buffer_shards = checks.integer("buffer_shards", buffer_shards, 1, 2**40)
        self.position = 0
        self._order: tuple[int, Tensor] | None = None
        if len(self) == 0:
            count = len(source.available)
            raise ValueError(
                f"batch_size: expected batches that {count} samples fill, got {batch_size} for {world_size} processes"
            )

    def __len__(self) -> int:
        """Batches an epoch, the same for every process."""
        whole, rest = divmod(len(self.source.available), self.batch_size * self.world_size)
        return whole + (not self.drop_last and rest >= self.world_size)

    @property
    def epoch(self) -> int:
        return self.position // len(self)

    def order(self, epoch: int) -> Tensor:
        """int64: the samples in the order of an epoch, for all processes together."""
        available = self.source.available
        if self.shuffle == "none":
            return available
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        if self.shuffle == "full":
            return available[torch.randperm(len(available), generator=generator)]
        shard = available // self.source.samples_per_shard
        shards = [available[part] for part in torch.tensor_split(torch.arange(len(shard)), shard.diff().nonzero().squeeze(1) + 1)]
        shuffled = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
        groups = [torch.cat(shuffled[i : i + self.buffer_shards]) for i in range(0, len(shuffled), self.buffer_shards)]
        return torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])

    def indices(self, position: int) -> Tensor:
        """int64: the samples of this process's batch number `position`, on the device of a resident store."""
        epoch, step = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch).to(getattr(self.source, "device", "cpu")))
        common = self._order[1][step * self.batch_size * self.world_size :][: self.batch_size * self.world_size]
        share = len(common) // self.world_size
        return common[self.rank * share : (self.rank + 1) * share]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise RuntimeError("num_workers: a stream counts its position in the process that draws from it, expected 0 workers")
        end = (self.epoch + 1) * len(self)
        while self.position < end:
            batch = self.source[self.indices(self.position)]
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch drawn by the stream that `state` is of. The number of processes may be another one, if the
        batches of all of them together are of the same size. Raises ValueError for a stream of other samples or options."""
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ValueError(f"state: it is of a stream with {name} = {state.get(name)}, expected {expected}")
        self.position = checks.integer("position", state["position"], 0, 2**62)

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": len(self.source.available),
            "common_batch": self.batch_size * self.world_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "buffer_shards": self.buffer_shards,
        }
