"""Speed of a LatentStore of 2 KiB latents with labels: writing, checking, reading in sequence and at random, streaming.

    python benchmarks/store.py --out benchmarks/results/store_cpu.json

Everything is read from the page cache (the store has just been written); each way of reading is checked before it is timed.
Rates of reading are those of the median shard or batch, so that what else the machine does counts little; writing, verifying and
the copy to a device are timed as a whole. With `--device cuda` also a store that is resident on the GPU.
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
    """Median time of a call."""
    return statistics.median(lap(function) for _ in range(repeat))


def lap(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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


def in_sequence(store: bldm.LatentStore, buffer: torch.Tensor) -> float:
    """GB/s of copying the latents of the median full shard."""
    full = [batch["packed"] for _, batch in store.shards() if len(batch["packed"]) == len(buffer)]
    return buffer.nbytes / statistics.median([lap(lambda part=part: buffer.copy_(part)) for part in full]) / 1e9


def rate(draw: Callable[[], Any], size: int, cuda: bool) -> int:
    """Latents a second of the median batch; on a GPU of a run of 20, which is then waited for."""
    repeat = 20 if cuda else 1

    def run() -> None:
        for _ in range(repeat):
            draw()
        if cuda:
            torch.cuda.synchronize()

    run()
    return round(size * repeat / seconds(run, max(10, DRAWS // size // repeat)))


def measure(path: Path, count: int, device: str | None) -> dict[str, Any]:
    total = count * LATENT / 1e9
    results: dict[str, Any] = {"latents": count, "gigabytes": rounded(total)}
    results["write_gb_per_s"] = rounded(total / write(path, count))
    results["open_ms"] = rounded(1e3 * seconds(lambda: bldm.LatentStore(path)))
    store = bldm.LatentStore(path)
    assert store.verify() == () and len(store) == count
    results["verify_gb_per_s"] = rounded(total / seconds(store.verify, 3))
    buffer = torch.zeros(store.samples_per_shard, 16, 16, 8, dtype=torch.uint8)
    results["sequential_first_gb_per_s"] = rounded(in_sequence(bldm.LatentStore(path), buffer))
    in_sequence(store, buffer)
    results["sequential_again_gb_per_s"] = rounded(in_sequence(store, buffer))
    results["epoch_order_ms"] = rounded(1e3 * seconds(lambda: store.stream(64).order(0)))
    sources: dict[str, Any] = {"": store}
    if device is not None:
        results["to_device_gb_per_s"] = rounded(total / seconds(lambda: (store.to(device), torch.cuda.synchronize()), 3))
        sources["resident_"] = store.to(device)
    for name, source in sources.items():
        for size in BATCHES:
            batches = itertools.cycle(torch.randint(count, (100, size)).to(getattr(source, "device", "cpu")))
            indices = next(batches)
            assert right(source[indices], indices)
            drawn = rate(lambda s=source, b=batches: s[next(b)], size, name != "")
            results[f"{name}random_{size}_latents_per_s"] = drawn
        for shuffle in ("full", "shards"):
            stream = source.stream(64, shuffle=shuffle)
            assert right(source[stream.indices(0)], stream.indices(0))
            endless = itertools.chain.from_iterable(itertools.repeat(stream))
            results[f"{name}stream_{shuffle}_64_latents_per_s"] = rate(lambda e=endless: next(e), 64, name != "")
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
