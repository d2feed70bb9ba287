"""One call of the sampler: its arguments, checked, as plans and inputs of batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..latents import check_padding
from . import conditions
from .conditions import Condition
from .conventions import Conventions
from .loop import Inputs, Plan
from .outputs import Output
from .rules import StepTable, step_table
from .time_labels import label_table


@dataclass
class Job:
    """Everything a call is about, on the sampler's device; `batches` cuts it."""

    conventions: Conventions
    latent_shape: tuple[int, ...]
    num_samples: int
    timesteps: list[int]
    table: StepTable
    labels: Tensor
    scales: tuple[float, ...]
    outputs: tuple[Output, ...]
    temperature: float
    seed: int
    sample_offset: int
    history: bool
    start: Tensor
    cond: Condition
    null_cond: Condition
    keep_mask: Tensor | None
    keep_bits: Tensor | None
    hook_inputs: dict[str, Tensor]

    @property
    def guided(self) -> bool:
        return any(scale != 1 for scale in self.scales)

    def batches(self, size: int) -> Iterator[tuple[int, Plan, Inputs]]:
        """(index of the first sample, plan, inputs) of every batch of at most `size` samples."""
        for first in range(0, self.num_samples, max(size, 1)):
            yield first, *self._batch(slice(first, min(first + size, self.num_samples)))

    def _batch(self, rows: slice) -> tuple[Plan, Inputs]:
        inputs = Inputs(
            start=self.start[rows],
            coefficients=self.table.coefficients,
            noise=self.table.noise,
            labels=self.labels,
            scales=self.scales,
            seed=self.seed,
            sample_offset=self.sample_offset + rows.start,
            cond=conditions.each(lambda value: value[rows], self.cond),
            null_cond=conditions.each(lambda value: value[rows], self.null_cond),
            keep_mask=None if self.keep_mask is None else self.keep_mask[rows],
            keep_bits=None if self.keep_bits is None else self.keep_bits[rows],
            hook={name: value[rows] if value.dim() > 1 else value for name, value in self.hook_inputs.items()},
        )
        plan = Plan(
            num_samples=rows.stop - rows.start,
            outputs=self.outputs,
            noisy=self.table.noisy,
            label_dtype=self.labels.dtype,
            temperature=self.temperature,
            guided=self.guided,
            masked=self.keep_mask is not None,
            probability=self.conventions.final == "probability",
            history=self.history,
            cond=conditions.signature(inputs.cond),
            null_cond=conditions.signature(inputs.null_cond),
        )
        return plan, inputs


Tables = tuple[StepTable, Tensor, tuple[Output, ...]]


class Desk:
    """Turns a call's arguments into a `Job`; every error names the argument, or both of a wrong combination."""

    TABLES = 8  # kept at a time: they take longer to make than a step

    def __init__(self, conventions: Conventions, schedule: bk.BernoulliSchedule, latent_shape: tuple[int, ...]):
        self.conventions, self.schedule, self.latent_shape = conventions, schedule, latent_shape
        self._tables: dict[tuple[int, ...], Tables] = {}
        self._spaced: dict[int, list[int]] = {}

    def job(
        self,
        num_samples: int,
        steps: int,
        *,
        timesteps: Sequence[int] | Tensor | None,
        temperature: float,
        seed: int,
        sample_offset: int,
        cond: Any,
        null_cond: Any,
        guidance_scale: float | Sequence[float] | Tensor | None,
        keep_mask: Tensor | None,
        keep_bits: Tensor | None,
        start: Tensor | None,
        hook_inputs: Mapping[str, Tensor] | None,
        history: bool,
        device: torch.device,
    ) -> Job:
        """Arguments as in `FastSampler.run`, and the device of the job."""
        pieces = self.conventions
        num_samples = bk.checks.integer("num_samples", num_samples, 0, 2**40)
        chosen = self._timesteps(steps, timesteps)
        table, labels, outputs = self._table(tuple(chosen))
        temperature = bk.checks.positive("temperature", temperature)
        seed = bk.checks.integer("seed", seed, -(2**63), 2**64 - 1)
        sample_offset = bk.checks.sample_offset(sample_offset)
        scales = tuple(pieces.guidance.table(guidance_scale, len(chosen)))
        guided = any(scale != 1 for scale in scales)
        if guided and cond is None:
            raise ValueError(f"guidance_scale: {guidance_scale} needs a condition, but cond is None")
        if guided and null_cond is None and pieces.guidance.calls == 1:
            raise ValueError(f"guidance_scale: {guidance_scale} needs a null condition, but null_cond is None")
        cond = conditions.check(cond, num_samples, device)
        null = conditions.check_null(null_cond, cond, device) if guided and null_cond is not None else None
        mask = self._packed("keep_mask", keep_mask, num_samples, device)
        kept = self._packed("keep_bits", keep_bits, num_samples, device)
        if (mask is None) != (kept is None):
            raise ValueError("keep_mask, keep_bits: expected both or neither")
        x_t = self._packed("start", start, num_samples, device)
        for name, value in (("keep_bits", kept), ("start", x_t)):
            if value is not None:
                check_padding(name, value, self.latent_shape[-1])
        if hook_inputs and pieces.hook is None:
            raise ValueError("hook_inputs: expected None, as the conventions' hook is None")
        if x_t is None:
            x_t = bk.random_bits(num_samples, self.latent_shape, seed=seed, sample_offset=sample_offset, device=device)
        return Job(
            conventions=pieces,
            latent_shape=self.latent_shape,
            num_samples=num_samples,
            timesteps=chosen,
            table=table,
            labels=labels,
            scales=scales,
            outputs=outputs,
            temperature=temperature,
            seed=seed,
            sample_offset=sample_offset,
            history=history,
            start=x_t,
            cond=cond,
            null_cond=null,
            keep_mask=mask,
            keep_bits=kept,
            hook_inputs={name: value.to(device) for name, value in (hook_inputs or {}).items()},
        )

    def _timesteps(self, steps: int, timesteps: Sequence[int] | Tensor | None) -> list[int]:
        total = self.schedule.num_steps
        if timesteps is None:
            steps = bk.checks.integer("steps", steps, 1, total)
            if steps not in self._spaced:
                _make_room(self._spaced, self.TABLES)
                self._spaced[steps] = self.conventions.spaced(total, steps)
            return list(self._spaced[steps])
        chosen = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        return [bk.checks.integer("timesteps", t, 1, total) for t in chosen]

    def _table(self, timesteps: tuple[int, ...]) -> Tables:
        if timesteps not in self._tables:
            pieces = self.conventions
            table = step_table(self.schedule, timesteps, pieces.rule, pieces.final)
            made = table, label_table(pieces.label(), timesteps), tuple(pieces.output_of(t) for t in timesteps)
            _make_room(self._tables, self.TABLES)
            self._tables[timesteps] = made
        return self._tables[timesteps]

    def _packed(self, name: str, value: Tensor | None, num_samples: int, device: torch.device) -> Tensor | None:
        if value is None:
            return None
        bk.checks.packed(name, value, min_dim=1)
        item = (*self.latent_shape[:-1], (self.latent_shape[-1] + 7) // 8)
        if tuple(value.shape) not in (item, (num_samples, *item)):
            raise ValueError(
                f"{name}: expected packed bits of shape {item} for all samples, or {(num_samples, *item)}, "
                f"got {tuple(value.shape)}"
            )
        return value.to(device).expand(num_samples, *item)


def _make_room(kept: dict[Any, Any], most: int) -> None:
    """Drop the oldest entry where one more would be too many."""
    if len(kept) >= most:
        kept.pop(next(iter(kept)))
