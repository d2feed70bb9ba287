"""Streams of a LatentStore: shuffled, shared among processes, resumed; and a store on the device, searched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.store import LatentStream
from conftest import require_gpu
from store_samples import COUNT, PACKED, PER_SHARD, fill, same, writer
from torch.utils.data import DataLoader

import bldm_kernels as bk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


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
