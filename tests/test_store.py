"""LatentStore: what is written is what is read, in every way of reading; shuffled, shared, resumed; and what damage does."""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.store import Column, LatentStream, StoreWriter
from bldm.store.layout import DTYPES, INDEX, Index
from conftest import require_gpu
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def same(batch: dict[str, Tensor], indices: Any) -> bool:
    expected = {name: value[indices] for name, value in SAMPLES.items()}
    return batch.keys() == expected.keys() and all(
        torch.equal(batch[name], value) and batch[name].dtype == value.dtype for name, value in expected.items()
    )


# --- reading ----------------------------------------------------------------------------------------------------------
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


# --- writing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [1, 8, 29])
def test_the_bytes_do_not_depend_on_the_batches(folder: Path, tmp_path: Path, part: int) -> None:
    assert contents(fill(tmp_path / "other", part)) == contents(folder)


@pytest.mark.parametrize("seen", [0, 7, 8, 20, 28])
def test_an_interrupted_store_is_continued(folder: Path, tmp_path: Path, seen: int) -> None:
    path = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt), writer(path) as filled:
        filled.append(**rows(0, seen))
        raise KeyboardInterrupt
    store = bldm.LatentStore(path)
    assert len(store) == seen // PER_SHARD * PER_SHARD and not store.complete
    with writer(path) as filled:
        assert filled.committed == len(store)
        filled.append(**rows(filled.committed, COUNT))
    assert contents(path) == contents(folder)


def test_close_leaves_a_store_to_go_on_with(tmp_path: Path) -> None:
    one = writer(tmp_path)
    one.append(**rows(0, 10))
    one.close()
    with pytest.raises(ValueError, match="store: .* is closed"):
        one.append(**rows(10, 20))
    with pytest.raises(ValueError, match="store: .* is closed"):
        one.finish()
    assert writer(tmp_path).committed == 8


def test_leftovers_are_removed_and_foreign_files_are_not(tmp_path: Path) -> None:
    one = writer(tmp_path)
    one.append(**rows(0, 8))
    one.close()
    leftovers = (".index.json.abc", ".shard-00001.safetensors.xyz", "shard-00001.safetensors")
    for name in (*leftovers, "notes.txt"):
        (tmp_path / name).write_text("half a file")
    two = writer(tmp_path)
    assert two.committed == 8
    assert {file.name for file in tmp_path.iterdir()} == {INDEX, "shard-00000.safetensors", "notes.txt"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    one = writer(tmp_path)
    with pytest.raises(ValueError, match=f"store: another process is writing to {tmp_path}"):
        writer(tmp_path)
    one.close()
    writer(tmp_path).close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_shape": (3, 2, 12)}, r"latent_shape: the store .* was begun with \(3, 2, 13\), got \(3, 2, 12\)"),
        ({"columns": {}}, "columns: the store .* was begun with .*'label'.*, got {}"),
        ({"samples_per_shard": 9}, "samples_per_shard: the store .* was begun with 8, got 9"),
        ({"metadata": {"about": ["a", 2]}}, r"metadata\['about'\]: the store .* was begun with \['a', 1\], got \['a', 2\]"),
        ({"metadata": {"about": ["a", 1], "b": 0}}, r"metadata\['b'\]: the store .* was begun with None, got 0"),
        ({}, "store: .* is complete, with 29 samples; choose another folder"),
    ],
)
def test_only_the_same_store_is_continued(folder: Path, changes: dict[str, Any], message: str) -> None:
    before = contents(folder)
    for _ in range(2):  # and the lock is not held
        with pytest.raises(ValueError, match=message):
            writer(folder, **changes)
    assert contents(folder) == before


def test_a_failed_write_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, replace = writer(tmp_path), os.replace

    def fail(source: str, target: Path) -> None:
        if Path(target).name == INDEX:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        one.append(**rows(0, 20))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is closed"):
        one.append(**rows(0, 20))
    with writer(tmp_path) as two:
        assert two.committed == 0
        two.append(**rows(0, COUNT))
    assert same(bldm.LatentStore(tmp_path, verify=True)[:], slice(None))


def appended(**changes: Any) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        given = {**rows(0, 4), **changes}
        writer(path).append(**{name: value for name, value in given.items() if value is not None})

    return run


def opened(**changes: Any) -> Callable[[Path], None]:
    return lambda path: writer(path, **changes).close()


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (appended(packed=PACKED[:4].int()), TypeError, "packed: expected dtype uint8, got int32"),
        (appended(packed=PACKED[:4, :2]), ValueError, r"packed: expected shape \(4, 3, 2, 2\)"),
        (appended(packed=PACKED[:4] | 128), ValueError, "packed: the last 3 bits of every position are padding"),
        (appended(label=torch.zeros(3, dtype=torch.int64)), ValueError, r"label: expected shape \(4,\)"),
        (appended(label=torch.zeros(4)), TypeError, "label: expected dtype int64, got float32"),
        (appended(text=None), ValueError, r"columns: expected \['label', 'text'\], got \['label'\]"),
        (appended(more=PACKED), ValueError, r"columns: expected \['label', 'text'\], got \['label', 'text', 'more'\]"),
        (opened(latent_shape=()), ValueError, "latent_shape: expected at least the number of channels"),
        (opened(latent_shape=(3, 0)), ValueError, "latent_shape: expected 1 <= latent_shape"),
        (opened(columns={"packed": ((), torch.int64)}), ValueError, "columns: expected names .*, got 'packed'"),
        (opened(columns={"a b": ((), torch.int64)}), ValueError, "columns: expected names .*, got 'a b'"),
        (
            opened(columns={"x": ((), torch.complex64)}),
            TypeError,
            "columns: expected a dtype among .* for 'x', got torch.complex64",
        ),
        (opened(columns={"x": ((0,), torch.int64)}), ValueError, "columns: expected 1 <= columns"),
        (opened(samples_per_shard=0), ValueError, "samples_per_shard: expected 1 <= samples_per_shard"),
    ],
)
def test_wrong_arguments(tmp_path: Path, run: Callable[[Path], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------
def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


SHARD = "shard-00001.safetensors"
DAMAGE: list[tuple[str, Callable[[Path], Any], str, bool]] = [
    ("truncated", lambda p: os.truncate(p, p.stat().st_size - 1), r"is truncated \(\d+ bytes, expected \d+\)", True),
    ("empty", lambda p: p.write_bytes(b""), r"is truncated \(0 bytes, expected \d+\)", True),
    ("too long", lambda p: p.write_bytes(p.read_bytes() + b"x"), "is too long", True),
    ("missing", lambda p: p.unlink(), "is missing", True),
    ("header", lambda p: flip(p, 20), "has a damaged header", True),
    ("another shard", lambda p: p.write_bytes((p.parent / "shard-00000.safetensors").read_bytes()), "does not match its", False),
    ("first byte of data", lambda p: flip(p, -8 * (12 + 8 + 12)), "does not match its checksum", False),
    ("last byte", lambda p: flip(p, -1), "does not match its checksum", False),
]


@pytest.mark.parametrize(("damage", "reason", "at_once"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damaged_shards_are_named_and_the_rest_is_read(
    folder: Path, damage: Callable[[Path], Any], reason: str, at_once: bool
) -> None:
    damage(folder / SHARD)
    message = f"{SHARD} {reason}.*: samples 8 to 15 are unavailable"
    with pytest.warns(UserWarning, match=message):
        store = bldm.LatentStore(folder, verify=not at_once)
    assert len(store) == COUNT and len(store.damage) == 1
    found = store.damage[0]
    assert found.file == folder / SHARD and (found.start, found.stop) == (8, 16) and re.search(reason, found.reason)
    assert store.available.tolist() == [*range(8), *range(16, COUNT)] and store.verify() == store.damage
    assert same(store[store.available], store.available) and [start for start, _ in store.shards()] == [0, 16, 24]
    for index in (8, [3, 15], slice(None), -20):
        with pytest.raises(ValueError, match=f"index: sample .* cannot be read: .*{message}"):
            store[index]  # type: ignore[index]
    drawn = torch.cat([batch["label"] for batch in store.stream(3, drop_last=False)])
    assert sorted(drawn.tolist()) == store.available.tolist()
    distances, indices = store.nearest(PACKED, 1)
    assert indices[store.available, 0].tolist() == store.available.tolist() and bool((distances[8:16] > 0).all())
    with pytest.raises(ValueError, match=f"{message}; only a whole store can be made resident"):
        store.to("cpu")
    again = pickle.loads(pickle.dumps(store))
    assert again.damage == store.damage and same(again[[0, 20]], [0, 20])


def test_an_unnoticed_flip_is_found_by_verify(folder: Path) -> None:
    flip(folder / SHARD, -1)
    flip(folder / "shard-00003.safetensors", -1)
    store = bldm.LatentStore(folder)
    assert store.damage == () and len(store.available) == COUNT
    assert [damage.file.name for damage in store.verify()] == [SHARD, "shard-00003.safetensors"]
    assert len(store.available) == 16 and store.damage == store.verify()
    (folder / "shard-00000.safetensors").unlink()  # gone after it was opened
    assert [damage.reason for damage in store.verify()][0] == "is missing"


def test_a_damaged_store_is_not_continued(tmp_path: Path) -> None:
    one = writer(tmp_path)
    one.append(**rows(0, 20))
    one.close()
    flip(tmp_path / SHARD, -1)
    with pytest.raises(ValueError, match=f"{SHARD} does not match its checksum.*goes on only from whole shards"):
        writer(tmp_path)


def edited(**changes: Any) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return run


def without(name: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return run


def rewritten(shard: int, **changes: Any) -> Callable[[Path], None]:
    """An index with a checksum that is right, though its shards are not."""

    def run(path: Path) -> None:
        index = Index.read(path.parent)
        index.shards[shard] = replace(index.shards[shard], **changes)
        index.write(path.parent)

    return run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten(1, samples=7), "shard 1 is shard-00001.safetensors with 7 samples, where 8 make a shard"),
        (rewritten(3, samples=9), "shard 3 is shard-00003.safetensors with 9 samples, where 8 make a shard"),
        (rewritten(2, file="../other"), "shard 2 is ../other with 8 samples"),
        (edited(version=2), "it is of version 2, and this library reads version 1"),
        (edited(format="zarr"), "expected the format 'bldm.LatentStore'"),
        (edited(complete=False), "its contents do not match its checksum"),
        (edited(latent_shape=[3, 2, 12]), "its contents do not match its checksum"),
        (without("shards"), "its contents do not match its checksum"),
        (without("version"), "is damaged: it has no 'version'"),
        (without("sha256"), "is damaged: it has no 'sha256'"),
        (lambda p: p.write_text("[1]"), "expected the format"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "cannot be used"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "cannot be used"),
        (lambda p: p.write_bytes(b""), "cannot be used"),
        (lambda p: p.unlink(), "has no index.json"),
    ],
)
def test_a_damaged_index_is_named_and_shards_stay_readable(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder / INDEX)
    for open_it in (bldm.LatentStore, writer):  # nothing is overwritten either
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_it(folder)
        assert re.search(message, str(caught.value)) and INDEX in str(caught.value) and str(folder) in str(caught.value)
        assert "its shards can still be read one by one, with bldm.PackedLatents.load" in str(caught.value)
    assert bldm.PackedLatents.load(folder / SHARD) == bldm.PackedLatents(PACKED[8:16], SHAPE)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=f"store: {path} has no index.json$"):
            bldm.LatentStore(path)


# --- streams ----------------------------------------------------------------------------------------------------------
def labels_of(stream: LatentStream) -> list[list[int]]:
    """The labels of one epoch, batch by batch; every batch is what the store holds."""
    batches = []
    for batch in stream:
        assert same(batch, batch["label"])
        batches.append(batch["label"].tolist())
    return batches


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("shuffle", ["full", "shards", "none"])
def test_an_epoch_is_a_permutation(folder: Path, shuffle: str, resident: bool) -> None:
    store = bldm.LatentStore(folder)
    source = store.to("cpu") if resident else store
    stream = source.stream(4, shuffle=shuffle, seed=3, drop_last=False)
    epochs = [labels_of(stream) for _ in range(3)]
    assert all(len(batches) == len(stream) == 8 and [len(b) for b in batches] == [4] * 7 + [1] for batches in epochs)
    flat = [[label for batch in batches for label in batch] for batches in epochs]
    assert all(sorted(labels) == list(range(COUNT)) for labels in flat)
    assert (flat[0] == flat[1]) == (shuffle == "none") and (flat[0] == list(range(COUNT))) == (shuffle == "none")
    assert labels_of(store.stream(4, shuffle=shuffle, seed=3, drop_last=False)) == epochs[0]
    other = labels_of(store.stream(4, shuffle=shuffle, seed=4, drop_last=False))
    assert (other == epochs[0]) == (shuffle == "none")
    dropped = labels_of(store.stream(4, shuffle=shuffle, seed=3))
    assert dropped == epochs[0][:7]


def test_shuffling_by_shards_reads_few_shards_at_a_time(folder: Path) -> None:
    order = bldm.LatentStore(folder).stream(1, shuffle="shards", buffer_shards=2).order(0)
    shards = (order // PER_SHARD).tolist()
    first = set(shards[:10])  # of 16 samples, or of 13 if the short shard is among them
    assert len(first) == 2 and shards.index(({0, 1, 2, 3} - first).pop()) >= 13 and order.tolist() != sorted(order.tolist())


@pytest.mark.parametrize("shuffle", ["full", "shards", "none"])
@pytest.mark.parametrize(("world", "batch"), [(1, 6), (2, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch(folder: Path, shuffle: str, world: int, batch: int, drop_last: bool) -> None:
    """Equal counts, nothing twice, and the common batches of six are those of a single process."""
    store = bldm.LatentStore(folder)
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
    parts = [labels_of(store.stream(batch, rank=rank, world_size=world, **options)) for rank in range(world)]
    assert len({tuple(len(b) for b in part) for part in parts}) == 1
    drawn = [label for part in parts for b in part for label in b]
    assert len(set(drawn)) == len(drawn) and COUNT - len(drawn) < (6 if drop_last else world)
    alone = labels_of(store.stream(6, **options))
    for step, common in enumerate(zip(*parts, strict=True)):
        together = [label for b in common for label in b]
        assert together == alone[step][: len(together)] and len(alone[step]) - len(together) < world


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("drawn", [0, 1, 5, 9, 10, 23])
def test_a_stream_goes_on_where_it_was(folder: Path, drawn: int, resident: bool) -> None:
    store = bldm.LatentStore(folder)
    source = store.to("cpu") if resident else store

    def endless(stream: LatentStream, count: int) -> list[list[int]]:
        batches: list[list[int]] = []
        while len(batches) < count:
            for batch in stream:
                batches.append(batch["label"].tolist())
                if len(batches) == count:
                    break
        return batches

    whole = endless(source.stream(3, seed=1), 30)
    first = source.stream(3, seed=1)
    assert len(first) == 9 and endless(first, drawn) == whole[:drawn]
    state = json.loads(json.dumps(first.state_dict()))
    second = store.stream(3, seed=1)
    second.load_state_dict(state)
    assert second.epoch == drawn // 9 and endless(second, 30 - drawn) == whole[drawn:]


def test_a_state_fits_other_numbers_of_processes_but_no_other_stream(folder: Path) -> None:
    store = bldm.LatentStore(folder)
    stream = store.stream(4)
    next(iter(stream))
    state = stream.state_dict()
    store.stream(2, rank=1, world_size=2).load_state_dict(state)
    for options, name in (
        ({"seed": 1}, "seed = 0, expected 1"),
        ({"batch_size": 5}, "common_batch = 4, expected 5"),
        ({"shuffle": "none"}, "shuffle = full, expected none"),
        ({"drop_last": False}, "drop_last = True, expected False"),
    ):
        with pytest.raises(ValueError, match=f"state: it is of a stream with {name}"):
            store.stream(**{"batch_size": 4, **options}).load_state_dict(state)  # type: ignore[arg-type]


def test_streams_in_loaders(folder: Path) -> None:
    stream = bldm.LatentStore(folder).stream(4)
    labels = [batch["label"] for batch in DataLoader(stream, batch_size=None)]
    assert len(labels) == 7 and len(torch.cat(labels).unique()) == 28 and stream.epoch == 1
    with pytest.raises(RuntimeError, match="num_workers: a stream counts its position .*, expected 0 workers"):
        list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 <= batch_size"),
        ({"batch_size": 30}, "batch_size: expected batches that 29 samples fill, got 30 for 1 processes"),
        ({"batch_size": 15, "world_size": 2, "rank": 0}, "batch_size: expected batches that 29 samples fill, got 15 for 2"),
        ({"shuffle": "half"}, "shuffle: expected one of 'full', 'shards', 'none', got 'half'"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank <= 1, got 2"),
        ({"seed": -1}, "seed: expected 0 <= seed"),
        ({"buffer_shards": 0}, "buffer_shards: expected 1 <= buffer_shards"),
    ],
)
def test_stream_options_are_checked(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bldm.LatentStore(folder).stream(**{"batch_size": 4, **options})


TWO_PROCESSES = """
import sys, torch
import bldm
torch.distributed.init_process_group("gloo")
labels = torch.cat([batch["label"] for batch in bldm.LatentStore(sys.argv[1]).stream(4, drop_last=False)])
parts = [torch.empty_like(labels) for _ in range(2)]
torch.distributed.all_gather(parts, labels)  # equal counts, or this fails
if torch.distributed.get_rank() == 0:
    print(sorted(torch.cat(parts).tolist()))
torch.distributed.destroy_process_group()
"""


def test_two_real_processes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = json.loads(done.stdout)
    assert len(drawn) == 28 and len(set(drawn)) == 28 and set(drawn) <= set(range(COUNT))


# --- resident, nearest ------------------------------------------------------------------------------------------------
def test_resident(folder: Path) -> None:
    resident = bldm.LatentStore(folder).to("cpu")
    assert len(resident) == COUNT and repr(resident) == "ResidentLatents(29 x (3, 2, 13) bits, cpu)"
    assert same(resident.tensors, slice(None)) and resident.metadata == {"about": ["a", 1]}
    indices = torch.tensor([4, 4, 28, 0])
    assert same(resident[indices], indices)
    with pytest.raises(TypeError, match="indices: expected a torch.Tensor, got int"):
        resident[3]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"indices: expected one dimension, got shape \(1, 1\)"):
        resident[torch.tensor([[3]])]


@pytest.mark.parametrize("k", [1, 3, 10, COUNT])
def test_nearest_is_hamming_topk_of_everything(folder: Path, k: int) -> None:
    """Equal distances in order of index: few bits, so that there are many of them."""
    path = folder.parent / "few"
    packed = bk.random_bits(COUNT, (3,), seed=2)
    with writer(path, latent_shape=(3,), columns=None) as filled:
        filled.append(packed)
    queries = bk.random_bits(6, (3,), seed=3)
    expected = bk.hamming_topk(queries, packed, k)
    store = bldm.LatentStore(path)
    for source in (store, store.to("cpu")):
        found = source.nearest(queries, k)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
        with pytest.raises(ValueError, match="k: expected 1 <= k <= 29, got 30"):
            source.nearest(queries, 30)


def test_resident_on_a_gpu(folder: Path) -> None:
    """Drawn there, the same batches as on the CPU, and from a CUDA graph too."""
    require_gpu()
    store = bldm.LatentStore(folder)
    resident = store.to("cuda")
    assert resident.device.type == "cuda" and same({n: v.cpu() for n, v in resident.tensors.items()}, slice(None))
    for one, other in zip(store.stream(4, seed=2), resident.stream(4, seed=2), strict=True):
        assert all(value.is_cuda and torch.equal(value.cpu(), one[name]) for name, value in other.items())
    found = resident.nearest(PACKED[:3].cuda(), 4)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, store.nearest(PACKED[:3], 4), strict=True))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, store.nearest(PACKED[:3].cuda(), 4), strict=True))
    indices = torch.tensor([1, 2, 3], device="cuda")
    resident[indices]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = resident[indices]
    indices.copy_(torch.tensor([7, 28, 0]))
    graph.replay()
    assert same({name: value.cpu() for name, value in batch.items()}, torch.tensor([7, 28, 0]))
