"""LatentStore: the memory-mapped reader of a folder of packed latents."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bldm_kernels import checks

from .layout import PACKED, Column, Index, Layout, ShardEntry
from .nearest import nearest

if TYPE_CHECKING:
    from .resident import ResidentLatents
    from .stream import LatentStream
    from .writer import StoreWriter

GATHER = 2048  # indices at once: what they fetch stays in the cache while the next shard is looked at
Indices = int | slice | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Damage:
    """A shard that cannot be used: its file, why, and its samples `start` to `stop - 1`."""

    file: Path
    reason: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.file} {self.reason}: samples {self.start} to {self.stop - 1} are unavailable"


class LatentStore(Dataset):
    """A folder of packed latents, with other columns if there are any, mapped into memory.

    `store[i]` is sample i as a dict, {"packed": uint8 (*latent_shape[:-1], P), column: ...}; `store[indices]` (a slice, a
    sequence, an array or a tensor of integers) is a batch of samples, gathered into new memory. Opening looks at the size and the
    header of every shard; `verify=True`, or `verify()` later, at every byte. A shard that is damaged or missing is listed in
    `damage`, with a warning; its samples raise an error, and all others can be read.

    Args:
        path: the folder.
        verify: compare the checksum of every shard.
        warn: warn of damage.

    Attributes: `latent_shape` (bits of one latent), `columns` (name -> `Column`), `metadata`, `complete` (False while samples are
    still to be written), `damage`.

    Raises: FileNotFoundError or ValueError, naming the file, if there is no usable index.
    """

    def __init__(self, path: str | Path, *, verify: bool = False, warn: bool = True):
        self.path = Path(path)
        self.index = Index.read(self.path)
        self._map()
        if verify:
            self.verify()
        if warn:
            for damage in self.damage:
                warnings.warn(f"store: {damage}", stacklevel=2)

    @staticmethod
    def writer(
        path: str | Path,
        latent_shape: Sequence[int],
        columns: Mapping[str, tuple[Sequence[int], torch.dtype]] | None = None,
        *,
        samples_per_shard: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "StoreWriter":
        """Begin a store, or continue one that was interrupted: give it the samples from `writer.committed` on.

        Args:
            path: the folder; made if it is not there.
            latent_shape: bits of one latent, for example (16, 16, 64).
            columns: name -> (shape of one sample, dtype), for example {"label": ((), torch.int64)}.
            samples_per_shard: by default as many as make up to 64 MiB; what an interruption can lose is less than a shard.
            metadata: JSON values about the whole, for example the names of the classes.

        Raises: ValueError if a store there was begun with other arguments, is complete or damaged, or has another writer.
        """
        from .writer import StoreWriter

        return StoreWriter(path, Layout.check(latent_shape, columns or {}, samples_per_shard), metadata)

    # --- opening and checking ---------------------------------------------------------------------------------------------
    def _map(self) -> None:
        """Map every shard: `_rows[column][shard]` is an array of one item (all bytes of a sample) a sample, None if damaged."""
        self.damage: tuple[Damage, ...] = ()
        shards, self._samples, self._fields = self.index.shards, self.index.samples, self.index.layout.fields
        self._rows: dict[str, list[np.ndarray | None]] = {name: [None] * len(shards) for name in self._fields}
        for number, entry in enumerate(shards):
            reason = self._look(entry)
            if reason is not None:
                self._leave_out(number, reason)
            else:
                for name, rows in self._rows.items():
                    rows[number] = self._field(entry, name)

    def _look(self, entry: ShardEntry) -> str | None:
        """Why a shard cannot be used, as far as its size and header tell."""
        path, header = self.path / entry.file, self.index.layout.header(entry.samples)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.nbytes:
                    return f"is {'truncated' if size < entry.nbytes else 'too long'} ({size} bytes, expected {entry.nbytes})"
                return None if file.read(len(header)) == header else "has a damaged header"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    def _field(self, entry: ShardEntry, name: str) -> np.ndarray:
        layout = self.index.layout
        offset = len(layout.header(entry.samples))
        for other, column in self._fields.items():
            if other == name:
                break
            offset += entry.samples * column.nbytes
        # Copy on write: torch has no read-only tensors, and the file must not change through one.
        path, item = self.path / entry.file, _item(self._fields[name])
        return np.memmap(path, item, "c", offset, (entry.samples,)).view(np.ndarray)

    def _leave_out(self, number: int, reason: str) -> None:
        start, entry = number * self.samples_per_shard, self.index.shards[number]
        found = Damage(self.path / entry.file, reason, start, start + entry.samples)
        self.damage = tuple(sorted((*self.damage, found), key=lambda damage: damage.start))
        for rows in self._rows.values():
            rows[number] = None
        self.__dict__.pop("available", None)

    def verify(self) -> tuple[Damage, ...]:
        """Read every byte and compare the checksums (SHA-256); returns `damage`, which then lists whatever differs."""

        def check(number: int) -> str | None:
            entry = self.index.shards[number]
            reason = self._look(entry)
            if reason is not None:
                return reason
            found = hashlib.sha256(np.memmap(self.path / entry.file, np.uint8, "r").data).hexdigest()
            return None if found == entry.sha256 else "does not match its checksum"

        whole = [number for number in range(len(self.index.shards)) if self._whole(number)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            reasons = list(pool.map(check, whole))
        for number, reason in zip(whole, reasons, strict=True):
            if reason is not None:
                self._leave_out(number, reason)
        return self.damage

    def _whole(self, number: int) -> bool:
        return self._rows[PACKED][number] is not None

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a DataLoader: what is mapped stays here, and is mapped again there."""
        return {"path": self.path, "index": self.index, "known": self.damage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.index = state["path"], state["index"]
        self._map()
        for damage in state["known"]:
            if self._whole(damage.start // self.samples_per_shard):
                self._leave_out(damage.start // self.samples_per_shard, damage.reason)

    # --- what there is ----------------------------------------------------------------------------------------------------
    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.index.layout.latent_shape

    @property
    def columns(self) -> dict[str, Column]:
        return self.index.layout.columns

    @property
    def metadata(self) -> dict[str, Any]:
        return self.index.metadata

    @property
    def complete(self) -> bool:
        return self.index.complete

    @property
    def samples_per_shard(self) -> int:
        return self.index.layout.samples_per_shard

    def __len__(self) -> int:
        """All samples of the index, those of damaged shards too: an index means the same sample whatever is damaged."""
        return self._samples

    @cached_property
    def available(self) -> Tensor:
        """int64: the indices of all samples that can be read, ascending."""
        there = torch.ones(len(self), dtype=torch.bool)
        for damage in self.damage:
            there[damage.start : damage.stop] = False
        return there.nonzero().squeeze(1)

    def __repr__(self) -> str:
        rest = "".join(f", {name} {column.shape}" for name, column in self.columns.items())
        return f"LatentStore({self.path}: {len(self)} x {self.latent_shape} bits{rest})"

    # --- reading ----------------------------------------------------------------------------------------------------------
    def __getitem__(self, index: Indices) -> dict[str, Tensor]:
        if isinstance(index, (int, np.integer)):
            batch = self._gather(self._check(np.array([index], np.int64)))
            return {name: value[0] for name, value in batch.items()}
        if isinstance(index, slice):
            return self._gather(self._check(np.arange(*index.indices(len(self)), dtype=np.int64)))
        indices = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        if indices.size and indices.dtype.kind not in "iu":
            raise TypeError(f"index: expected integers, got {indices.dtype.name}")
        if indices.ndim != 1:
            raise ValueError(f"index: expected one dimension, got shape {indices.shape}")
        return self._gather(self._check(indices.astype(np.int64)))

    def _check(self, indices: np.ndarray) -> np.ndarray:
        """Indices from 0 on, all of them of samples that can be read."""
        total = len(self)
        if indices.size and (indices.min() < -total or indices.max() >= total):
            wrong = indices[(indices < -total) | (indices >= total)][0]
            raise IndexError(f"index: expected within {-total}..{total - 1}, got {wrong}")
        indices = np.where(indices < 0, indices + total, indices)
        for damage in self.damage:
            wrong = indices[(indices >= damage.start) & (indices < damage.stop)]
            if wrong.size:
                raise ValueError(f"index: sample {wrong[0]} cannot be read: {damage}")
        return indices

    def _gather(self, indices: np.ndarray) -> dict[str, Tensor]:
        out = {name: np.empty(len(indices), _item(column)) for name, column in self._fields.items()}
        for start in range(0, len(indices), GATHER):
            part = indices[start : start + GATHER]
            shards = part // self.samples_per_shard
            order = shards.argsort(kind="stable")
            local = (part - shards * self.samples_per_shard)[order]
            shards = shards[order]
            cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(part)]
            for begin, end in zip(cuts, cuts[1:], strict=False):
                number, where, which = int(shards[begin]), order[begin:end] + start, local[begin:end]
                for name, rows in self._rows.items():
                    out[name][where] = rows[number][which]  # type: ignore[index]
        return {name: _tensor(rows, self._fields[name]) for name, rows in out.items()}

    def shards(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Shard after shard without copying: (index of its first sample, its samples). Damaged ones are left out."""
        for number in range(len(self.index.shards)):
            if self._whole(number):
                rows = {name: _tensor(rows[number], self._fields[name]) for name, rows in self._rows.items()}  # type: ignore[arg-type]
                yield number * self.samples_per_shard, rows

    def stream(self, batch_size: int, **options: Any) -> "LatentStream":
        """Batches of samples, shuffled, shared among processes, resumable: a `LatentStream`, which says what the options are."""
        from .stream import LatentStream

        return LatentStream(self, batch_size, **options)

    def to(self, device: torch.device | str) -> "ResidentLatents":
        """All samples in the memory of a device, as `ResidentLatents`. Raises ValueError if a shard is damaged."""
        from .resident import ResidentLatents

        return ResidentLatents.load(self, device)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k stored latents nearest to each query in Hamming distance.

        Args:
            queries: uint8 (Q, *latent_shape[:-1], P); the search runs on its device, shard by shard.
            k: at most the number of available samples.

        Returns: distances int32 (Q, k) ascending and indices int64 (Q, k); equal distances come in order of index.
        """
        checks.integer("k", k, 1, len(self.available))
        return nearest(queries, ((start, batch["packed"]) for start, batch in self.shards()), k)


def _item(column: Column) -> np.dtype:
    """All bytes of one sample as one item, which numpy copies whole."""
    return np.dtype((np.void, column.nbytes))


def _tensor(rows: np.ndarray, column: Column) -> Tensor:
    """Rows of bytes as what they are."""
    return torch.from_numpy(rows.view(np.uint8)).view(column.dtype).view(len(rows), *column.shape)
