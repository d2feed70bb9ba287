"""A writer that is killed loses nothing that was committed, and the store it leaves is finished as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.store import writer as writer_module
from bldm.store.layout import INDEX

import bldm_kernels as bk

SHAPE, PER_SHARD, PART = (4, 4, 20), 16, 5
COLUMNS: dict[str, Any] = {"label": ((), torch.int64)}
KILLS = 20
# Processes that start with everything imported.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bldm", "test_store_kill"])


def samples(start: int, stop: int) -> dict[str, torch.Tensor]:
    return {
        "packed": bk.random_bits(stop - start, SHAPE, seed=1, sample_offset=start),
        "label": torch.arange(start, stop) * 7 % 100,
    }


def write(path: str, count: int, end_after: int | None = None) -> None:
    """Continue the store up to `count` samples; with `end_after`, die at that system call."""
    torch.set_num_threads(1)
    if end_after is not None:
        die_at(end_after)
    with bldm.LatentStore.writer(path, SHAPE, COLUMNS, samples_per_shard=PER_SHARD) as writer:
        for start in range(writer.committed, count, PART):
            writer.append(**samples(start, min(start + PART, count)))


def die_at(call: int) -> None:
    """SIGKILL in front of the call number `call` of those that change what is on the disk."""
    calls = 0

    def counted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **kwargs)

        return run

    os.replace, os.fsync, os.chmod = counted(os.replace), counted(os.fsync), counted(os.chmod)
    tempfile.mkstemp = counted(tempfile.mkstemp)
    writer_module.hashlib.sha256 = counted(writer_module.hashlib.sha256)  # type: ignore[assignment]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def check(path: Path, at_least: int) -> int:
    """Everything committed is whole and right; returns how many samples there are."""
    if not (path / INDEX).exists():
        assert at_least == 0
        return 0
    store = bldm.LatentStore(path, verify=True)
    assert store.damage == () and len(store) >= at_least
    assert store.complete or len(store) % PER_SHARD == 0
    expected = samples(0, len(store))
    found = store[:]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return len(store)


def uninterrupted(path: Path, count: int) -> dict[str, bytes]:
    write(str(path), count)
    return contents(path)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    count = 16 * 120 + 3
    whole, path = uninterrupted(tmp_path / "whole", count), tmp_path / "store"
    generator, kills, committed = random.Random(0), 0, 0
    while kills < KILLS:
        process = PROCESSES.Process(target=write, args=(str(path), count))
        process.start()
        while process.is_alive() and len(list(path.glob("shard-*"))) * PER_SHARD <= committed:  # until it has begun to write
            time.sleep(0.001)
        time.sleep(generator.random() * 0.03)
        process.kill()
        process.join()
        committed = check(path, committed)
        if process.exitcode == 0:  # too late, on a machine that busy: from the start again
            shutil.rmtree(path)
            committed = 0
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert 0 < committed < count
    write(str(path), count)
    assert contents(path) == whole and check(path, count) == count


def kill_at_every_step(root: Path, count: int) -> None:
    """A store root/0, root/1, ... for every call at which a writer can die. This process has a single thread: it may fork."""
    for call in range(1000):
        child = os.fork()
        if child == 0:
            try:
                write(str(root / str(call)), count, call)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            break


def test_killed_at_every_step(tmp_path: Path) -> None:
    """Between any two calls that touch the disk, in a store of two shards and a rest."""
    count = 2 * PER_SHARD + 3
    whole, root = uninterrupted(tmp_path / "whole", count), tmp_path / "parts"
    root.mkdir()
    process = PROCESSES.Process(target=kill_at_every_step, args=(root, count))
    process.start()
    process.join()
    assert process.exitcode == 0
    calls = len(list(root.iterdir()))
    assert calls > 40, "every file is written, synced and renamed, and so is its folder"
    assert contents(root / str(calls - 1)) == whole, "the last one was not killed"
    left = set()
    for call in range(calls - 1):
        path = root / str(call)
        left.add(tuple(sorted("temporary" if name.startswith(".") else name for name in contents(path))))
        if check(path, 0) == count:
            with pytest.raises(ValueError, match="is complete"):
                write(str(path), count)
        else:
            write(str(path), count)
        assert contents(path) == whole
    assert () in left and ("temporary",) in left and (INDEX, "shard-00000.safetensors", "temporary") in left
