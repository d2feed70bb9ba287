"""Writing a LatentStore: interrupted, continued, refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.store.layout import INDEX
from store_samples import COUNT, PACKED, PER_SHARD, contents, fill, rows, same, writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


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
