"""A small store and what is in it, for the tests of LatentStore."""

from pathlib import Path
from typing import Any

import bldm
import torch
from bldm.store import StoreWriter
from torch import Tensor

import bldm_kernels as bk

SHAPE, COUNT, PER_SHARD = (3, 2, 13), 29, 8
COLUMNS: dict[str, Any] = {"label": ((), torch.int64), "text": ((2, 3), torch.bfloat16)}
PACKED = bk.random_bits(COUNT, SHAPE, seed=0)
TEXT = torch.randn(COUNT, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
SAMPLES = {"packed": PACKED, "label": torch.arange(COUNT), "text": TEXT}


def writer(path: Path, **changes: Any) -> StoreWriter:
    options = {"samples_per_shard": PER_SHARD, "metadata": {"about": ["a", 1]}, **changes}
    shape, columns = options.pop("latent_shape", SHAPE), options.pop("columns", COLUMNS)
    return bldm.LatentStore.writer(path, shape, columns, **options)


def rows(start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in SAMPLES.items()}


def fill(path: Path, part: int = 5) -> Path:
    with writer(path) as filled:
        for start in range(0, COUNT, part):
            filled.append(**rows(start, min(start + part, COUNT)))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def same(batch: dict[str, Tensor], indices: Any) -> bool:
    expected = {name: value[indices] for name, value in SAMPLES.items()}
    return batch.keys() == expected.keys() and all(
        torch.equal(batch[name], value) and batch[name].dtype == value.dtype for name, value in expected.items()
    )
