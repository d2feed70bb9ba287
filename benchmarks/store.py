"""Speed of a LatentStore of 2 KiB latents with labels: writing, checking, reading in sequence and at random, streaming.

    python benchmarks/store.py --out benchmarks/results/store_cpu.json

Everything is read from the page cache (the store has just been written); each way of reading is checked before it is timed.
Medians of several repetitions. With `--device cuda` also a store that is resident on the GPU.
"""

import argparse
import datetime
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import torch
from bldm.bench.run import commit, device_name
from bldm.checkpoint import write_atomically

import bldm_kernels as bk

SHAPE, LATENT = (16, 16, 64), 2048
BATCHES = (64, 256, 1024, 4096)
DRAWS = 200_000


def seconds(function: Callable[[], Any], repeat: int = 5) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def write(path: Path, count: int) -> float:
    """Seconds to write `count` latents: checksums, and everything synced to the disk."""
    part = 32768
    packed = bk.random_bits(part, SHAPE, seed=0)
    number = torch.arange(count)
    start = time.perf_counter()
    with bldm.LatentStore.writer(path, SHAPE, {"label": ((), torch.int64)}) as writer:
        for first in range(0, count, part):
            label = number[first : first + part]
            # Bytes 0 to 7 of every latent tell which one it is, so that reading can be checked.
            packed[: len(label), 0, 0] = label.view(torch.uint8).view(-1, 8)
            writer.append(packed[: len(label)], label=label)
    return time.perf_counter() - start


def right(batch: dict[str, torch.Tensor], indices: torch.Tensor) -> bool:
    named = batch["packed"][:, 0, 0].contiguous().view(torch.int64).squeeze(1)
    return torch.equal(batch["label"], indices) and torch.equal(named, indices)


def in_sequence(store: bldm.LatentStore, buffer: torch.Tensor) -> None:
    for _, batch in store.shards():
        buffer[: len(batch["packed"])].copy_(batch["packed"])


def drawn(source: Any, batches: list[torch.Tensor]) -> None:
    for indices in batches:
        source[indices]
    if indices.is_cuda:
        torch.cuda.synchronize()


def streamed(stream: Any) -> None:
    *_, last = (batch["packed"].device for batch in itertools.islice(stream, DRAWS // 64))
    if last.type == "cuda":
        torch.cuda.synchronize()


def measure(path: Path, count: int, device: str | None) -> dict[str, Any]:
    total = count * LATENT / 1e9
    results: dict[str, Any] = {"latents": count, "gigabytes": rounded(total)}
    results["write_gb_per_s"] = rounded(total / write(path, count))
    results["open_ms"] = rounded(1e3 * seconds(lambda: bldm.LatentStore(path)))
    store = bldm.LatentStore(path)
    assert store.verify() == () and len(store) == count
    results["verify_gb_per_s"] = rounded(total / seconds(store.verify, 3))
    buffer = torch.zeros(store.samples_per_shard, 16, 16, 8, dtype=torch.uint8)
    results["sequential_first_gb_per_s"] = rounded(total / seconds(lambda: in_sequence(bldm.LatentStore(path), buffer)))
    results["sequential_again_gb_per_s"] = rounded(total / seconds(lambda: in_sequence(store, buffer)))
    generator = torch.Generator().manual_seed(0)
    sources = {"": store} if device is None else {"": store, "resident_": store.to(device)}
    if device is not None:
        results["to_device_gb_per_s"] = rounded(total / seconds(lambda: (store.to(device), torch.cuda.synchronize()), 3))
    for name, source in sources.items():
        for size in BATCHES:
            batches = [torch.randint(count, (size,), generator=generator) for _ in range(max(1, DRAWS // size))]
            batches = [indices.to(device) if name and device else indices for indices in batches]
            assert right(source[batches[0]], batches[0])
            rate = size * len(batches) / seconds(lambda source=source, batches=batches: drawn(source, batches))
            results[f"{name}random_{size}_latents_per_s"] = round(rate)
        for shuffle in ("full", "shards"):
            stream = source.stream(64, shuffle=shuffle)
            assert right(source[stream.indices(0)], stream.indices(0))
            results[f"{name}stream_{shuffle}_64_latents_per_s"] = round(
                64 * min(len(stream), DRAWS // 64) / seconds(lambda s=stream: streamed(s))
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=1_281_167, help="how many; ImageNet by default, 2.6 GB")
    parser.add_argument("--folder", type=Path, help="where to make the store [default: a temporary folder]")
    parser.add_argument("--device", help="also resident on this device")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(Path(folder) / "store", arguments.latents, arguments.device)
    devices = ["cpu"] if arguments.device is None else ["cpu", arguments.device]
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{' and '.join(device_name(torch.device(name)) for name in devices)}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    text = json.dumps({**about, "results": results}, indent=1) + "\n"
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out, lambda name: Path(name).write_text(text))


if __name__ == "__main__":
    main()
