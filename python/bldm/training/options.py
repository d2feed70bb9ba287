"""What a training run is told."""

import math
from dataclasses import dataclass

from bldm_kernels import checks

SCHEDULES = ("cosine", "constant")


@dataclass
class TrainOptions:
    """steps, batch_size (a process), lr, warmup steps, and so on; `max_minutes` ends a run early, after a checkpoint.

    Args:
        lr_schedule: "cosine" (decay to a hundredth) or "constant", both after a linear warm-up.
        mixed_precision: "no", or "bf16": the model computes in bfloat16, beside float32 weights that learn.
        compile: compile the model's blocks.
        fsdp: shard weights, gradients and optimiser over the processes (FSDP2), instead of a copy on each.
        save_every: steps between checkpoints.
        image_every: steps between sample grids in TensorBoard; needs log_dir.
    """

    steps: int = 10_000
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 200
    lr_schedule: str = "cosine"
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    mixed_precision: str = "no"
    compile: bool = False
    fsdp: bool = False
    save_every: int = 2000
    max_minutes: float | None = None
    resume: bool = False
    log_dir: str | None = None
    image_every: int = 2000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "image_every"):
            checks.integer(name, getattr(self, name), 1, 2**40)
        checks.integer("warmup", self.warmup, 0, 2**40)
        for name in ("lr", "grad_clip"):
            checks.positive(name, getattr(self, name))
        if not 0 <= checks.real("ema_decay", self.ema_decay) < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")
        if self.max_minutes is not None:
            checks.positive("max_minutes", self.max_minutes)
        checks.option("mixed_precision", self.mixed_precision, ("no", "bf16"))
        checks.option("lr_schedule", self.lr_schedule, SCHEDULES)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * learning_rate_factor(step, self.warmup, self.steps, self.lr_schedule)


def learning_rate_factor(step: int, warmup: int, total: int, schedule: str = "cosine") -> float:
    """Linear warm-up (at most a tenth of the run), then cosine decay to a hundredth, or 1."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
