"""The reverse process of one batch: static buffers in, every step, results out. Run as it is, or captured as one graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..parts import part
from . import conditions, outputs
from .conditions import Condition
from .conventions import Conventions
from .execution import Execution
from .outputs import CERTAIN, Output
from .states import logits_of, to_state
from .steps import Steps, step_denoiser

# The flips of "threshold-renoise" are draws of their own: step i takes the random stream's step 2^27 + i.
NOISE_STEPS = 2**27
Callback = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Plan:
    """What a loop is built for, and a captured graph is bound to."""

    num_samples: int
    outputs: tuple[Output, ...]
    noisy: tuple[bool, ...]
    label_dtype: torch.dtype
    temperature: float
    guided: bool
    masked: bool
    probability: bool
    history: bool
    cond: object
    null_cond: object

    @property
    def num_steps(self) -> int:
        return len(self.outputs)


@dataclass
class Inputs:
    """What changes from run to run: every value goes into a buffer of the loop."""

    start: Tensor
    coefficients: Tensor
    noise: Tensor
    labels: Tensor
    scales: tuple[float, ...]
    seed: int
    sample_offset: int
    cond: Condition = None
    null_cond: Condition = None
    keep_mask: Tensor | None = None
    keep_bits: Tensor | None = None
    hook: Mapping[str, Tensor] = field(default_factory=dict)


class Loop:
    """S steps over one batch. After `run`: `x` packed, `probability` or None, `states` (S + 1, B, ...) or None."""

    def __init__(
        self,
        plan: Plan,
        conventions: Conventions,
        latent_shape: tuple[int, ...],
        execution: Execution,
        inputs: Inputs,
    ):
        self.plan, self.conventions, self.latent_shape, self.execution = plan, conventions, latent_shape, execution
        device, steps = execution.device, plan.num_steps
        self.batched = plan.guided and conventions.guidance.calls == 1
        self.start = torch.empty_like(inputs.start, memory_format=torch.contiguous_format)
        self.coefficients = torch.empty(steps, 4, device=device)
        self.noise = torch.empty(steps, 4, device=device)
        self.scales = torch.empty(steps, device=device)
        rows = 2 * plan.num_samples if self.batched else plan.num_samples
        self.labels = torch.empty(steps, rows, dtype=plan.label_dtype, device=device)
        self.seed, self.sample_offset = (torch.empty(1, dtype=torch.int64, device=device) for _ in range(2))
        self.nonfinite = torch.empty(steps, dtype=torch.int32, device=device)
        self.ignored = torch.zeros(1, dtype=torch.int32, device=device)
        self.cond = conditions.each(torch.empty_like, self._stacked(inputs.cond, inputs.null_cond))
        self.null_cond = None if self.batched else conditions.each(torch.empty_like, inputs.null_cond)
        self.keep_mask = None if inputs.keep_mask is None else torch.empty_like(self.start)
        self.keep_bits = None if inputs.keep_bits is None else torch.empty_like(self.start)
        hook = conventions.hook
        self.hook_buffers = {} if hook is None else hook.buffers(torch.empty(plan.num_samples, *latent_shape, device=device))
        self.rows = rows
        self.denoiser = step_denoiser(conventions, execution, plan.guided, inputs.cond)
        self.steps: Steps | None = None
        # What is loaded: a sampler uses the same tables and scales again and again, and a copy waits for the host.
        self._tables_of: Tensor | None = None
        self._scales_of: tuple[float, ...] | None = None
        self.x = self.start
        self.probability: Tensor | None = None
        self.states: Tensor | None = None

    def _stacked(self, cond: Condition, null: Condition) -> Condition:
        """Condition and null condition in one batch, for guidance in one call."""
        return conditions.each(lambda a, b: torch.cat([a, b]), cond, null) if self.batched else cond

    def load(self, inputs: Inputs) -> None:
        """Fill the buffers for the next run."""
        self.start.copy_(inputs.start)
        if inputs.coefficients is not self._tables_of:
            self.coefficients.copy_(inputs.coefficients)
            self.noise.copy_(inputs.noise)
            self.labels.copy_(inputs.labels.to(self.labels.device)[:, None].expand_as(self.labels))
            self._tables_of = inputs.coefficients
        if inputs.scales != self._scales_of:
            self.scales.copy_(torch.tensor(inputs.scales))
            self._scales_of = inputs.scales
        self.seed.fill_(inputs.seed - 2**64 if inputs.seed >= 2**63 else inputs.seed)
        self.sample_offset.fill_(inputs.sample_offset)
        conditions.each(lambda buffer, value: buffer.copy_(value), self.cond, self._stacked(inputs.cond, inputs.null_cond))
        conditions.each(lambda buffer, value: buffer.copy_(value), self.null_cond, inputs.null_cond)
        for buffer, value in ((self.keep_mask, inputs.keep_mask), (self.keep_bits, inputs.keep_bits)):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        if self.conventions.hook is not None:
            self.conventions.hook.begin(self.hook_buffers, inputs.hook)

    def run(self, callback: Callback | None = None, check: Callable[[Tensor], None] | None = None) -> None:
        """All steps; after each, `check` sees the counts of non-finite logits so far and `callback` the new state."""
        x = self._begin()
        states = [x]
        with self.execution.context():
            for i in range(self.plan.num_steps):
                with part(f"step {i}"):
                    x = self.step(i, x)
                states.append(x)
                if check is not None:
                    check(self.nonfinite[: i + 1])
                if callback is not None:
                    with torch.autocast(x.device.type, enabled=False):
                        callback(i, x)
                if not self.plan.history:
                    states.clear()
        self.x = x
        self.states = torch.stack(states) if self.plan.history else None

    def rehearse(self) -> None:
        """The first and the last step, for what happens once only: compilation, tuning, tables."""
        with self.execution.context():
            x = self._begin()
            for i in sorted({0, self.plan.num_steps - 1}):
                x = self.step(i, x)

    def _begin(self) -> Tensor:
        with part("begin"):
            self.nonfinite.zero_()
            x = self.start
            if self.denoiser is not None:
                self.steps = self.denoiser.begin(self.labels[:, 0], self.cond, self.rows)  # type: ignore[arg-type]
            if self.keep_mask is not None and self.keep_bits is not None:
                x = (x & ~self.keep_mask) | (self.keep_bits & self.keep_mask)
        return x

    def step(self, i: int, x: Tensor) -> Tensor:
        """x_t -> x_s of step i; under the final "probability" the last step leaves x_t as it is and sets `probability`."""
        plan, output = self.plan, self.plan.outputs[i]
        last = i == plan.num_steps - 1
        options: dict[str, Any] = {"seed": self.seed, "sample_offset": self.sample_offset}
        options |= {"keep_mask": self.keep_mask, "keep_bits": self.keep_bits}
        said: dict[str, Any] = {
            "temperature": plan.temperature,
            "prediction": output.prediction,
            "nonfinite": self.nonfinite[i : i + 1],
        }
        only_logits = self.conventions.hook is None and not (last and plan.probability)
        if self.steps is not None and only_logits and not plan.noisy[i] and output.read is outputs.logits:
            scale = self.scales[i : i + 1] if plan.guided else None
            return self.steps.flip(i, x, self.coefficients[i], guidance_scale=scale, **said, **options)
        logits, uncond = self._logits(i, x, output)
        if not only_logits:
            with part("hook"):
                probability = self._x_0_probability(i, x, logits, uncond, output, last)
            if last and plan.probability:
                self.nonfinite[i] += (~torch.isfinite(probability)).sum()
                self.probability = probability
                return x
            logits, uncond = torch.logit(probability).clamp(-CERTAIN, CERTAIN), None
            said |= {"temperature": 1.0, "prediction": "x_0"}
        with part("flip"):
            guidance: dict[str, Any] = {} if uncond is None else {"guidance_scale": self.scales[i : i + 1]}
            x = bk.flip_step(logits, x, self.coefficients[i], step=i, uncond_logits=uncond, **guidance, **said, **options)
            if plan.noisy[i]:  # the flip probability is n0 whatever the logits are
                x = bk.flip_step(logits, x, self.noise[i], step=NOISE_STEPS + i, nonfinite=self.ignored, **options)
        return x

    def _logits(self, i: int, x: Tensor, output: Output) -> tuple[Tensor, Tensor | None]:
        """Logits (B, *latent_shape) with the condition and, when guided, without."""
        pieces, count = self.conventions, self.plan.num_samples
        call, denoise = pieces.call, self.execution.denoise
        if self.steps is not None:
            logits = logits_of(output.read(self.steps.logits(i, x)), self.rows, self.latent_shape, pieces.layout)
            return (logits[:count], logits[count:]) if self.batched else (logits, None)
        with part("state"):
            x = torch.cat([x, x]) if self.batched else x
            state = to_state(x, self.latent_shape, pieces.state, pieces.layout, pieces.state_dtype)

        def logits_under(cond: Condition) -> Tensor:
            with part("denoiser"):
                answer = output.read(call(denoise, state, self.labels[i], cond))
            return logits_of(answer, len(state), self.latent_shape, pieces.layout)

        logits = logits_under(self.cond)
        if self.batched:
            return logits[:count], logits[count:]
        if self.plan.guided:
            return logits, logits_under(self.null_cond)
        return logits, None

    def _x_0_probability(self, i: int, x: Tensor, logits: Tensor, uncond: Tensor | None, output: Output, last: bool) -> Tensor:
        """P(x_0 = 1) float32 (B, *latent_shape), after the hook."""
        mixed = logits.float()
        if uncond is not None:
            mixed = torch.lerp(uncond.float(), mixed, self.scales[i])
        said = torch.sigmoid(mixed / self.plan.temperature)
        bits = bk.unpack_bits(x, self.latent_shape[-1])
        x_0 = said if output.prediction == "x_0" else (bits - said).abs()
        # sigmoid would hide an infinity that the step counts
        x_0 = torch.where(torch.isfinite(mixed), x_0, torch.nan)
        hook = self.conventions.hook
        return x_0 if hook is None else hook(said, x_0, self.hook_buffers, last)
