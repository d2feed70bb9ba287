"""What a training step takes: the paper's denoiser (batch 64, 16x16x64 bits, bfloat16), beside the usual way of doing it.

    python -m benchmarks.training [--parts objective,reference,bldm] [--steps 20]
    torchrun --nproc-per-node 2 -m benchmarks.training --parts bldm

Writes benchmarks/results/training_<device>.json, one entry a part and number of GPUs; parts that a run leaves out keep theirs.

- reference: the model of accelerate_models.py under autocast and torch.compile, the paper's objective on float32 bits in
  PyTorch, AdamW.
- bldm: what `bldm train --compile` runs: `BinaryDenoiser`, `DiffusionLoss` on packed bits, `Learner` (forward and backward as
  CUDA graphs; clipping and the moving average of the weights included).
- objective: noise, loss and gradient alone, for logits that are there already.

Run as a module: a script in this folder would find accelerate.py here instead of the library.
Steps are timed by events, the median of several; memory is the most that PyTorch holds of the GPU while they run, as what a CUDA
graph uses is not counted as allocated.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bldm.bench.run import commit as current_commit
from bldm.denoiser import BinaryDenoiser
from bldm.losses import DiffusionLoss
from bldm.training.graph import WARM_UP
from bldm.training.learner import Learner
from bldm.training.options import TrainOptions
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

from .accelerate_models import PaperDenoiser

BATCH, TOKENS, BITS, TIMES = 64, 256, 64, 64
SIZE: dict[str, Any] = {"width": 768, "depth": 24, "num_heads": 12}
Row = dict[str, Any]


# --- the usual way -----------------------------------------------------------------------------------------------------
class UsualObjective:
    """The paper's training objective in PyTorch: float32 bits, Bernoulli noise, cross entropy balanced by class."""

    def __init__(self, device: torch.device | str):
        self.keep = (1 - torch.arange(TIMES + 1, device=device) / TIMES).float()

    def __call__(self, denoiser: Callable[..., Tensor], x_0: Tensor) -> Tensor:
        t = torch.randint(1, TIMES + 1, (len(x_0),), device=x_0.device)
        keep = self.keep[t].view(-1, 1, 1)
        x_t = torch.bernoulli(x_0 * keep + 0.5 * (1 - keep))
        flipped = torch.logical_xor(x_0, x_t) * 1.0
        logits = denoiser(x_t, time_steps=t - 1)
        losses = F.binary_cross_entropy_with_logits(logits.float(), flipped, reduction="none")
        share = flipped.mean((1, 2), keepdim=True)
        return (losses * (flipped * (1 - share) + (1 - flipped) * share)).mean()


class Given(nn.Module):
    """Logits that are there already."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, t: Tensor | None = None, *, time_steps: Tensor | None = None) -> Tensor:
        return self.logits


def check_objectives(device: torch.device | str = "cuda") -> None:
    """Both objectives are the same function: their gradients agree for the same noise."""
    torch.manual_seed(0)
    logits = torch.randn(8, TOKENS, BITS, device=device, requires_grad=True)
    x_0, x_t = (torch.rand(8, TOKENS, BITS, device=device) < share for share in (0.5, 0.4))
    flipped = (x_0 ^ x_t).float()
    share = flipped.mean((1, 2), keepdim=True)
    usual = F.binary_cross_entropy_with_logits(logits, flipped, reduction="none")
    (expected,) = torch.autograd.grad((usual * (flipped * (1 - share) + (1 - flipped) * share)).mean(), logits)
    loss = bk.flip_loss(logits, bk.pack_bits(x_0), bk.pack_bits(x_t), focal_gamma=0.0)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


# --- timing ------------------------------------------------------------------------------------------------------------
def timed(step: Callable[[int], Any], steps: int, warmup: int) -> Row:
    """Median milliseconds of a step on the GPU, those of the host alone, and the peak of its memory."""
    for i in range(warmup):
        step(i)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for i in range(2):  # memory comes back
        step(warmup + i)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    began = time.perf_counter()
    events[0].record()
    for i in range(steps):
        step(warmup + i)
        events[i + 1].record()
    host = 1e3 * (time.perf_counter() - began) / steps
    torch.cuda.synchronize()
    whole = 1e3 * (time.perf_counter() - began) / steps
    ms = statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    return {"ms": ms, "host_ms": host, "mean_ms": whole, "peak_gib": torch.cuda.max_memory_reserved() / 2**30}


def graph_ms(call: Callable[[], Any], calls: int = 20) -> float:
    """Milliseconds of a call inside a CUDA graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    times = []
    for _ in range(20):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / calls)
    return statistics.median(times)


# --- the parts -----------------------------------------------------------------------------------------------------------
def objective(device: torch.device, steps: int) -> Row:
    """Noise, loss and gradient alone, milliseconds: called as in a training step, and inside a CUDA graph."""
    check_objectives(device)
    logits = torch.randn(BATCH, TOKENS, BITS, device=device, dtype=torch.bfloat16, requires_grad=True)
    packed = bk.random_bits(BATCH, (TOKENS, BITS), seed=0, device=device)
    criterion = DiffusionLoss(bk.BernoulliSchedule("linear", TIMES), form="balanced")
    given, usual = Given(logits), UsualObjective(device)
    bits = bk.unpack_bits(packed, BITS)

    def ours(i: int) -> None:
        torch.autograd.grad(criterion(given, packed, BITS, seed=0, step=i)["loss"], logits)

    t = torch.randint(1, TIMES + 1, (BATCH,), device=device)
    flip = criterion.schedule.flip.float().to(device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def captured() -> None:
        x_t = bk.add_noise(packed, flip[t], seed=seed, num_bits=BITS)
        torch.autograd.grad(bk.flip_loss(logits, packed, x_t, focal_gamma=0.0), logits)

    def theirs(i: int) -> None:
        torch.autograd.grad(usual(given, bits), logits)

    return {
        "bldm": timed(ours, 200, 20),
        "bldm_in_a_graph_ms": graph_ms(captured),
        "reference": timed(theirs, 200, 20),
        "reference_in_a_graph_ms": graph_ms(lambda: theirs(0)),
    }


def reference(device: torch.device, steps: int) -> Row:
    torch.manual_seed(0)
    with device:
        model = PaperDenoiser(steps=TIMES)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    usual = UsualObjective(device)
    bits = torch.bernoulli(torch.full((BATCH, TOKENS, BITS), 0.5, device=device))

    def step(i: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = usual(compiled, bits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step, steps, 3)


def bldm(device: torch.device, steps: int, **changes: Any) -> Row:
    torch.manual_seed(0)
    accel = Accelerator(mixed_precision="no")
    options = TrainOptions(**{"mixed_precision": "bf16", "compile": True, "lr": 1e-4, **changes})
    with device:
        model = BinaryDenoiser(TOKENS, BITS, num_steps=TIMES, time_embedding="reference", **SIZE)
        nn.init.normal_(model.head.weight, std=0.02)
    learner = Learner(model, options, accel)
    criterion = DiffusionLoss(bk.BernoulliSchedule("linear", TIMES), form="balanced")
    packed = bk.random_bits(BATCH, (TOKENS, BITS), seed=accel.process_index, device=device)

    def step(i: int) -> None:
        with learner.computing():
            loss = criterion(learner.module, packed, BITS, seed=accel.process_index, step=i)["loss"]
        learner.update(loss, i, 1e-4)

    return timed(step, steps, WARM_UP + 2)


PARTS: dict[str, Callable[[torch.device, int], Row]] = {"objective": objective, "reference": reference, "bldm": bldm}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--commit", help="of this source, where it is no git checkout")
    arguments = parser.parse_args()
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    path = Path(__file__).parent / "results" / f"training_{name}.json"
    for part in arguments.parts.split(","):
        began = time.perf_counter()
        row = PARTS[part](device, arguments.steps)
        torch.cuda.empty_cache()
        if part != "objective":
            row = {"images_per_second": gpus * BATCH / row["mean_ms"] * 1e3, **row}
        if rank:
            continue
        of_run = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": arguments.commit or current_commit()}
        row = rounded({**row, "gpus": gpus, "seconds_in_all": time.perf_counter() - began}) | of_run
        print(part, json.dumps(row), flush=True)
        results: Row = json.loads(path.read_text()) if path.exists() else {}
        results[part if gpus == 1 else f"{part}, {gpus} GPUs"] = row
        results["machine"] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": "python -m benchmarks.training",
            "setting": f"batch {BATCH} a GPU, {TOKENS} x {BITS} bits, {SIZE}, bfloat16",
        }
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
