"""StoreWriter: fills a store shard by shard, and goes on where an interrupted one ended."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bldm_kernels import checks

from ..checkpoint import fsync_folder, write_atomically
from ..latents import check_padding
from .layout import INDEX, PACKED, Index, Layout, ShardEntry, shard_name
from .reader import LatentStore


class StoreWriter:
    """Appends samples to a store; see `LatentStore.writer`, which makes one.

    A shard is written when it is full: under another name, synced, renamed, and only then entered in the index, which is
    replaced in the same way. So a kill at any moment leaves a store of whole shards, which the next writer continues: it must be
    given the samples from number `committed` on. `finish` writes the rest and marks the store as complete; leaving a `with`
    block does so too, unless by an exception.
    """

    def __init__(self, path: str | Path, layout: Layout, metadata: Mapping[str, Any] | None):
        self.path, self.layout = Path(path), layout
        wanted = Index(layout, json.loads(json.dumps(dict(metadata or {}))))
        self.path.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.path.parent)
        self._lock: int | None = _lock(self.path)
        try:
            self._index = self._continue(wanted)
        except BaseException:
            self.close()
            raise
        self._filled = 0
        self._buffers: dict[str, Tensor] = {}

    def _continue(self, wanted: Index) -> Index:
        for leftover in (*self.path.glob(f".{INDEX}.*"), *self.path.glob(f".{shard_name('*')}.*")):
            leftover.unlink()
        if not (self.path / INDEX).exists() and not any(self.path.glob(shard_name("*"))):
            wanted.write(self.path)  # from now on a folder with shards but no index is a damaged store, not a new one
            return wanted
        store = LatentStore(self.path, verify=True, warn=False)
        if store.damage:
            raise ValueError(f"store: {store.damage[0]}; an interrupted store goes on only from whole shards")
        index = store.index
        for name, found, expected in (
            ("latent_shape", index.layout.latent_shape, self.layout.latent_shape),
            ("columns", index.layout.columns, self.layout.columns),
            ("samples_per_shard", index.layout.samples_per_shard, self.layout.samples_per_shard),
            *((f"metadata[{k!r}]", index.metadata.get(k), wanted.metadata.get(k)) for k in {**index.metadata, **wanted.metadata}),
        ):
            if found != expected:
                raise ValueError(f"{name}: the store {self.path} was begun with {found}, got {expected}")
        if index.complete:
            raise ValueError(f"store: {self.path} is complete, with {index.samples} samples; choose another folder")
        # Renamed, but not entered before the kill: its samples will be given again.
        (self.path / shard_name(len(index.shards))).unlink(missing_ok=True)
        return index

    @property
    def committed(self) -> int:
        """Samples that are safely in the store: where a caller starts, and what a kill cannot take away."""
        return self._index.samples

    def append(self, packed: Tensor, **columns: Tensor) -> None:
        """Add samples.

        Args:
            packed: uint8 (B, *latent_shape[:-1], ceil(C / 8)), padding bits 0, on any device.
            columns: (B, *shape) of the column's dtype, for every column of the store.
        """
        if self._lock is None:
            raise ValueError(f"store: {self.path} is closed")
        given = {**columns, PACKED: checks.packed("packed", packed)}
        if given.keys() != self.layout.fields.keys():
            raise ValueError(f"columns: expected {list(self.layout.columns)}, got {list(columns)}")
        for name, column in self.layout.fields.items():
            checks.tensor(name, given[name], (column.dtype,))
            checks.shape(name, given[name], (len(packed), *column.shape), "one row a sample")
        check_padding("packed", packed, self.layout.latent_shape[-1])
        given = {name: value.detach().cpu() for name, value in given.items()}
        capacity, start = self.layout.samples_per_shard, 0
        if not self._buffers:
            self._buffers = {n: torch.empty(capacity, *c.shape, dtype=c.dtype) for n, c in self.layout.fields.items()}
        while start < len(packed):
            count = min(capacity - self._filled, len(packed) - start)
            for name, buffer in self._buffers.items():
                buffer[self._filled : self._filled + count] = given[name][start : start + count]
            self._filled, start = self._filled + count, start + count
            if self._filled == capacity:
                self._commit()

    def _commit(self, complete: bool = False) -> None:
        parts: list[bytes | memoryview] = [self.layout.header(self._filled)]
        for name in self.layout.fields:  # `numpy()` of bytes, since numpy has no bfloat16
            rows = self._buffers[name][: self._filled]
            parts.append(rows.reshape(-1).view(torch.uint8).numpy().data)
        checksum = hashlib.sha256()

        def write(name: str) -> None:
            with open(name, "wb") as file:
                for part in parts:
                    checksum.update(part)
                    file.write(part)

        file, done = shard_name(len(self._index.shards)), self._index.shards
        try:
            write_atomically(self.path / file, write)
            entry = ShardEntry(file, self._filled, sum(map(len, parts)), checksum.hexdigest())
            self._enter(replace(self._index, shards=[*done, entry], complete=complete))
        except BaseException:
            self.close()  # the next writer finds out what is on the disk
            raise
        self._filled = 0

    def _enter(self, index: Index) -> None:
        index.write(self.path)
        self._index = index

    def finish(self) -> None:
        """Commit the last samples and mark the store as complete: nothing can be added any more."""
        if self._lock is None:
            raise ValueError(f"store: {self.path} is closed")
        if self._filled:  # the shard and the mark at once: no store may go on after a shard that is not full
            self._commit(complete=True)
        else:
            self._enter(replace(self._index, complete=True))
        self.close()

    def close(self) -> None:
        """Stop here, without the samples that do not fill a shard; another writer can go on from `committed`."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._lock is not None:
            self.finish()
        self.close()


def _lock(folder: Path) -> int:
    """An exclusive lock on the folder itself, which ends with the process, however that ends."""
    import fcntl  # not on Windows, where stores can be read but not written

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"store: another process is writing to {folder}") from None
    except OSError:
        os.close(handle)
        raise
    return handle
