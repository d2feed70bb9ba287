"""The training loop both models share: accelerate, AdamW, EMA, warm-up and cosine decay, atomic checkpoints, exact resume."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bldm_kernels import checks

from ..checkpoint import write_atomically
from ..progress import progress_bar

CHECKPOINT, SUMMARY = "checkpoint.pt", "train.json"
REPORT_EVERY = 50
Objective = Callable[[nn.Module, Tensor, int], dict[str, Tensor]]


@dataclass
class TrainOptions:
    """steps, batch_size (a process), lr, warmup steps, and so on; `max_minutes` ends a run early, after a checkpoint."""

    steps: int = 10_000
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    mixed_precision: str = "no"
    compile: bool = False
    save_every: int = 2000
    max_minutes: float | None = None
    resume: bool = False
    log_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            checks.integer(name, getattr(self, name), 1, 2**40)
        for name in ("lr", "grad_clip"):
            checks.positive(name, getattr(self, name))
        if not 0 <= checks.real("ema_decay", self.ema_decay) < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")
        if self.max_minutes is not None:
            checks.positive("max_minutes", self.max_minutes)
        checks.option("mixed_precision", self.mixed_precision, ("no", "bf16"))


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up (at most a tenth of the run), then cosine decay to a hundredth."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


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
        from accelerate import Accelerator
    except ImportError:
        raise RuntimeError("training needs the extra: pip install 'bldm-kernels[train]'") from None
    return Accelerator(mixed_precision="no")  # autocast is ours: accelerate would keep its first choice for the whole process


def train(
    model: nn.Module, objective: Objective, num_items: int, options: TrainOptions, out: Path, accel: Any, details: dict[str, Any]
) -> nn.Module:
    """Minimise objective(model, rows, step)["loss"]; returns the averaged (EMA) model, on every process.

    Writes out/checkpoint.pt every `save_every` steps and out/train.json at the end (main process). With `options.resume` the
    run goes on from the checkpoint exactly as if it had not been interrupted: everything random is a function of the seed, the
    step and the process.
    """
    model = model.to(accel.device).train()
    ema = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.99))
    first, minutes = _restore(out / CHECKPOINT, model, ema, optimizer) if options.resume else (0, 0.0)
    trained, optimizer = accel.prepare(torch.compile(model) if options.compile else model, optimizer)
    batches = Batches(num_items, options.batch_size * accel.num_processes, options.seed)
    writer = _writer(options.log_dir) if accel.is_main_process else None
    start, done, means = time.perf_counter(), first, Means()
    with progress_bar(Console(quiet=not accel.is_main_process)) as progress:
        task = progress.add_task("training", total=options.steps, completed=first)
        for step in range(first, options.steps):
            torch.manual_seed(((options.seed + 1) * 1_000_000_007 + step * accel.num_processes + accel.process_index) % 2**63)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate_factor(step, options.warmup, options.steps)
            rows = batches(step).tensor_split(accel.num_processes)[accel.process_index].to(accel.device)
            with torch.autocast(accel.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
                losses = objective(trained, rows, step)
            optimizer.zero_grad(set_to_none=True)
            accel.backward(losses["loss"])
            accel.clip_grad_norm_(trained.parameters(), options.grad_clip)
            optimizer.step()
            # The average starts out shorter, so that a short run does not keep its random beginning.
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(options.ema_decay, (1 + step) / (10 + step)))
            ema.update_parameters(model)
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
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)
            progress.update(task, completed=done)
            if save and accel.is_main_process:
                _save(out / CHECKPOINT, done, minutes + seconds / 60, model, ema, optimizer)
            if late:
                break
    minutes += (time.perf_counter() - start) / 60
    if writer is not None:
        writer.close()
    if accel.is_main_process:
        write_summary(out, options, done, minutes, means.last, accel, details)
    return ema.module.eval()


class Means:
    """Mean losses since the last report, summed on the device: reading them is the only synchronisation."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.last: dict[str, float] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if self.count else value
        self.count += 1

    def read(self, step: int) -> dict[str, float]:
        self.last = {name: value.item() / self.count for name, value in self.sums.items()}
        self.count = 0
        if not math.isfinite(self.last["loss"]):
            raise FloatingPointError(f"loss: {self.last['loss']} at or before step {step}")
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


def _writer(log_dir: str | None) -> Any:
    if log_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RuntimeError("log_dir: needs tensorboard: pip install 'bldm-kernels[train]'") from None
    return SummaryWriter(log_dir)


def _save(path: Path, step: int, minutes: float, model: nn.Module, ema: nn.Module, optimizer: Any) -> None:
    state = {
        "step": step,
        "minutes": minutes,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(path, lambda name: torch.save(state, name))


def _restore(path: Path, model: nn.Module, ema: nn.Module, optimizer: Any) -> tuple[int, float]:
    """Load a checkpoint: the step to go on from and the minutes spent so far; 0 and 0 when there is none yet."""
    if not path.is_file():
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state.get("minutes", 0.0))
    except (KeyError, TypeError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"resume: {path} is not a checkpoint of this model: {error}") from None
