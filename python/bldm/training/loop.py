"""The training loop both models share: accelerate, AdamW, EMA, atomic checkpoints, exact resume, TensorBoard."""

import datetime
import json
import math
import os
import pickle
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..checkpoint import write_atomically
from ..progress import progress_bar
from .learner import Learner
from .options import TrainOptions

CHECKPOINT, SUMMARY = "checkpoint.pt", "train.json"
REPORT_EVERY = 50
Objective = Callable[[nn.Module, Tensor, int], dict[str, Tensor]]


class Partner(Protocol):
    """A second model that learns beside the first, once a step, from what the objective showed it."""

    learner: Learner

    def learn(self, step: int, lr: float) -> dict[str, Tensor]: ...


class Batches:
    """Row indices of every step: epochs of a permutation that depends on (seed, epoch) alone, so a resumed run needs no state."""

    def __init__(self, num_items: int, batch_size: int, seed: int):
        if num_items < 1:
            raise ValueError("data: expected at least one item, got none")
        self.num_items, self.batch_size, self.seed = num_items, min(batch_size, num_items), seed
        self.per_epoch = num_items // self.batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.num_items, generator=generator)
        return self._order[position * self.batch_size :][: self.batch_size]


def accelerator() -> Any:
    """huggingface accelerate: one GPU, several, or the CPU, as the launcher says."""
    try:
        from accelerate import Accelerator, DistributedType
    except ImportError:
        raise RuntimeError("training needs the extra: pip install 'bldm-kernels[train]'") from None
    # bfloat16 is the Learner's own business: accelerate would keep its first choice for the whole process.
    accel = Accelerator(mixed_precision="no")
    if accel.distributed_type == DistributedType.FSDP and not accel.is_fsdp2:
        raise ValueError("fsdp: the launcher says version 1, expected --fsdp_version 2 (or no --use_fsdp, and bldm's own --fsdp)")
    return accel


def train(
    model: nn.Module,
    objective: Objective,
    num_items: int,
    options: TrainOptions,
    out: Path,
    accel: Any,
    details: dict[str, Any],
    *,
    partner: Partner | None = None,
    draw: Callable[[nn.Module], Image.Image] | None = None,
) -> nn.Module:
    """Minimise objective(model, rows, step)["loss"]; returns the averaged (EMA) model, on every process.

    Writes out/checkpoint.pt every `save_every` steps and out/train.json at the end (main process). With `options.resume` the
    run goes on from the checkpoint exactly as if it had not been interrupted: everything random is a function of the seed, the
    step and the process.

    Args:
        partner: learns after the model in every step; its state is in the checkpoint.
        draw: picture of what the averaged model can do, for TensorBoard.
    """
    learner = Learner(model, options, accel)
    if accel.is_main_process:
        for left in out.glob(f".{CHECKPOINT}.*"):  # a process killed while it saved
            left.unlink()
    first, minutes = _restore(out / CHECKPOINT, learner, partner) if options.resume else (0, 0.0)
    batches = Batches(num_items, options.batch_size * accel.num_processes, options.seed)
    writer = _writer(options.log_dir, first) if accel.is_main_process else None
    start, done, means = time.perf_counter(), first, Means()
    with progress_bar(Console(quiet=not accel.is_main_process)) as progress:
        task = progress.add_task("training", total=options.steps, completed=first)
        for step in range(first, options.steps):
            torch.manual_seed(((options.seed + 1) * 1_000_000_007 + step * accel.num_processes + accel.process_index) % 2**63)
            rows = batches(step).tensor_split(accel.num_processes)[accel.process_index].to(accel.device, non_blocking=True)
            with learner.computing():
                losses = objective(learner.module, rows, step)
            learner.update(losses["loss"], step, options.rate(step))
            losses = {name: value.detach() for name, value in losses.items()}  # nothing holds the graph when the next one is made
            if partner is not None:
                losses = {**losses, **partner.learn(step, options.rate(step))}
            done = step + 1
            means.add(losses)
            seconds = time.perf_counter() - start
            late = done % 10 == 0 and options.max_minutes is not None and _any(seconds > 60 * options.max_minutes, accel)
            end = late or done == options.steps
            save = end or done % options.save_every == 0
            if save or done % REPORT_EVERY == 0 or step == first:  # before saving: what is saved is finite
                values = means.read(step)
                rate = (done - first) * batches.batch_size / seconds
                shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
                progress.update(task, description=f"{shown}  {rate:,.0f} images/s")
                if writer is not None:
                    for name, value in {**values, "lr": options.rate(step), "images_per_second": rate}.items():
                        writer.add_scalar(name, value, step)
            progress.update(task, completed=done)
            if save:
                state = _state(done, minutes + seconds / 60, learner, partner)  # on every process: the weights may be shared out
                if accel.is_main_process:
                    _save(out / CHECKPOINT, state)
            if draw is not None and options.log_dir is not None and (end or done % options.image_every == 0):
                picture = draw(learner.average())
                if writer is not None:
                    writer.add_image("samples", np.asarray(picture), done, dataformats="HWC")
            if late:
                break
    minutes += (time.perf_counter() - start) / 60
    if writer is not None:
        writer.close()
    if accel.is_main_process:
        write_summary(out, options, done, minutes, means.last, accel, details)
    return learner.average()


class Means:
    """Mean losses since the last report, summed on the device: reading them is the only synchronisation."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, step: int) -> dict[str, float]:
        self.last = {name: value.item() / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        for name, value in self.last.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: {value} at or before step {step}")
        return self.last


def _any(flag: bool, accel: Any) -> bool:
    """Whether the flag is set on any process, so that all stop together."""
    if accel.num_processes == 1:
        return flag
    return bool(accel.reduce(torch.tensor(float(flag), device=accel.device)).item())


def write_summary(
    out: Path, options: TrainOptions, steps: int, minutes: float, losses: dict[str, float], accel: Any, details: dict[str, Any]
) -> None:
    gpu = accel.device.type == "cuda"
    summary = {
        "command": shlex.join(["bldm", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name(accel.device) if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "processes": accel.num_processes,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "steps_done": steps,
        "minutes": round(minutes, 2),
        "final_losses": {name: round(value, 6) for name, value in losses.items()},
        "options": asdict(options),
        **details,
    }
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(out / SUMMARY, lambda name: Path(name).write_text(text))


def _writer(log_dir: str | None, first: int) -> Any:
    """Of TensorBoard; what an interrupted run wrote from step `first` on is not shown twice."""
    if log_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RuntimeError("log_dir: needs tensorboard: pip install 'bldm-kernels[train]'") from None
    return SummaryWriter(log_dir, purge_step=first or None)


def _state(step: int, minutes: float, learner: Learner, partner: Partner | None) -> dict[str, Any]:
    state = {"step": step, "minutes": minutes, **learner.state()}
    return state if partner is None else {**state, "partner": partner.learner.state()}


def _save(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda name: torch.save(state, name))


def _restore(path: Path, learner: Learner, partner: Partner | None) -> tuple[int, float]:
    """Load a checkpoint: the step to go on from and the minutes spent so far; 0 and 0 when there is none yet."""
    if not path.is_file():
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        learner.restore(state)
        if partner is not None:
            partner.learner.restore(state["partner"])
        return int(state["step"]), float(state.get("minutes", 0.0))
    except (KeyError, TypeError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"resume: {path} is not a checkpoint of this model: {error}") from None
