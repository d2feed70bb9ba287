"""LatentStore: what is written is what is read, in every way of reading."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.store import Column
from bldm.store.layout import DTYPES, INDEX
from safetensors.torch import load_file
from store_samples import COUNT, PACKED, PER_SHARD, SHAPE, contents, fill, same, writer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


def test_what_is_written_is_read(folder: Path) -> None:
    store = bldm.LatentStore(folder, verify=True)
    assert len(store) == COUNT and store.complete and store.damage == () and store.latent_shape == SHAPE
    assert store.columns == {"label": Column((), torch.int64), "text": Column((2, 3), torch.bfloat16)}
    assert store.metadata == {"about": ["a", 1]} and store.samples_per_shard == PER_SHARD
    assert repr(store) == f"LatentStore({folder}: 29 x (3, 2, 13) bits, label (), text (2, 3))"
    for index in (0, 7, 8, 28, -1, -29, np.int64(3)):
        assert same(store[index], int(index))
    assert same(store[:], slice(None)) and same(store[20:3:-4], torch.arange(20, 3, -4))
    indices = torch.tensor([28, 0, 8, 8, 7, 15, 16, -1])
    for form in (indices, indices.int(), indices.numpy(), indices.tolist()):
        assert same(store[form], indices)
    assert same(store[[]], slice(0, 0)) and store[torch.empty(0, dtype=torch.int64)]["text"].shape == (0, 2, 3)
    parts = list(store.shards())
    assert [start for start, _ in parts] == [0, 8, 16, 24]
    assert all(same(batch, slice(start, start + len(batch["packed"]))) for start, batch in parts)
    assert [sample["label"].item() for sample in store] == list(range(COUNT))  # type: ignore[attr-defined]


def test_many_indices(folder: Path) -> None:
    """More than are gathered at once."""
    indices = torch.randint(-COUNT, COUNT, (5000,), generator=torch.Generator().manual_seed(1))
    assert same(bldm.LatentStore(folder)[indices], indices)


def test_shards_are_packed_latents_and_safetensors(folder: Path) -> None:
    one = folder / "shard-00001.safetensors"
    assert bldm.PackedLatents.load(one) == bldm.PackedLatents(PACKED[8:16], SHAPE)
    assert same(load_file(one), slice(8, 16))
    assert {file.name for file in folder.iterdir()} == {INDEX, *(f"shard-{i:05}.safetensors" for i in range(4))}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    with writer(tmp_path, columns={"x": ((3,), dtype), "y": ((), torch.int64)}) as filled:
        filled.append(PACKED[:2], x=values, y=torch.tensor([5, -6]))
    store = bldm.LatentStore(tmp_path)
    assert torch.equal(store[[1, 0]]["x"], values.flip(0)) and store[1]["x"].dtype == dtype
    assert store[1]["y"].item() == -6 and torch.equal(load_file(tmp_path / "shard-00000.safetensors")["x"], values)


def test_the_file_does_not_change_through_a_tensor(folder: Path) -> None:
    before = contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, batch = next(iter(bldm.LatentStore(folder).shards()))
    batch["packed"].zero_()
    assert contents(folder) == before and same(bldm.LatentStore(folder)[:8], slice(0, 8))


def test_data_loaders_of_several_processes(folder: Path) -> None:
    """As a map-style data set, batched by a sampler, read by workers that map the files themselves."""
    store = bldm.LatentStore(folder)
    sampler = BatchSampler(RandomSampler(store), 6, drop_last=False)  # type: ignore[arg-type]
    labels = []
    for batch in DataLoader(store, sampler=sampler, batch_size=None, num_workers=1, multiprocessing_context="fork"):
        assert same(batch, batch["label"])
        labels += batch["label"].tolist()
    assert sorted(labels) == list(range(COUNT))
    assert same(pickle.loads(pickle.dumps(store))[5:9], slice(5, 9))


def test_no_columns_and_no_samples(tmp_path: Path) -> None:
    with writer(tmp_path / "a", columns=None) as filled:
        filled.append(PACKED)
    assert bldm.LatentStore(tmp_path / "a")[3].keys() == {"packed"}
    with writer(tmp_path / "b"):
        pass
    empty = bldm.LatentStore(tmp_path / "b", verify=True)
    assert len(empty) == 0 and empty.complete and not list(empty.shards()) and len(empty.available) == 0


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (COUNT, IndexError, "index: expected within -29..28, got 29"),
        (-30, IndexError, "index: expected within -29..28, got -30"),
        ([1, 99, 2], IndexError, "index: expected within -29..28, got 99"),
        (torch.tensor([0.5]), TypeError, "index: expected integers, got float32"),
        (torch.ones(COUNT, dtype=torch.bool), TypeError, "index: expected integers, got bool"),
        ([[1, 2]], ValueError, r"index: expected one dimension, got shape \(1, 2\)"),
    ],
)
def test_wrong_indices(folder: Path, index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bldm.LatentStore(folder)[index]
