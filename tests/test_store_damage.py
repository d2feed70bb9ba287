"""A damaged LatentStore: the damage is named, and the rest is read."""

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.store.layout import INDEX, Index
from store_samples import COUNT, PACKED, SHAPE, fill, rows, same, writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


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
