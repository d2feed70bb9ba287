"""FastSampler: the reverse process on packed bits, around any denoiser."""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk
from bldm_kernels.dispatch import forced_backend

from .conventions import Conventions
from .execution import Execution, device_of
from .graph import GraphCache, GraphInfo, Uncapturable
from .job import Desk, Job
from .loop import Inputs, Loop, Plan


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after every step: `x` is the packed state just made, safe to keep."""

    step: int
    num_steps: int
    timestep: int
    first_sample: int
    num_samples: int
    x: Tensor


@dataclass
class Samples:
    """What a run made: `latents` packed, `probability` P(x_0 = 1) float32 under the final "probability", `states`
    (S + 1, B, ..., P) packed with `history`, and the hook's buffers."""

    latents: Tensor
    probability: Tensor | None = None
    states: Tensor | None = None
    hook: dict[str, Tensor] = field(default_factory=dict)


class FastSampler:
    """Samples packed latents with any denoiser of a Bernoulli diffusion.

    Args:
        denoiser: callable (x_t, time (B,) int64[, cond]) -> logits (B, ..., C), or whatever `conventions` say.
        schedule: the `BernoulliSchedule` it was trained with.
        latent_shape: bits of one latent, the packed dimension last, for example (16, 16, 64) or (256, 64).
        conventions: the code base's conventions; any of their pieces (prediction, rule, final, time_label, state, layout, call,
            output, spacing, guidance, hook) may be given as an argument of its own, see `bldm.sampling.Conventions`.
        null_cond: the condition that means "none", for guidance (default: `denoiser.null_label` if there is one).
        device: where to sample (default: that of the denoiser's parameters or buffers, else the CPU).
        autocast: dtype to run the denoiser in, for example torch.bfloat16.
        compile: compile the denoiser: True, or options of torch.compile.
        graph: on a GPU, run all steps as one CUDA graph, captured at the first call for its batch size, number of steps and
            options and replayed with new seeds, conditions, scales and masks. Calls with a callback run as they are; so does a
            denoiser that cannot be captured, with a warning that says why.
        max_graphs: captured graphs kept; `graphs` lists them and `graph_bytes` says what they hold.

    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        schedule: bk.BernoulliSchedule,
        *,
        latent_shape: Sequence[int],
        conventions: Conventions | None = None,
        null_cond: int | Tensor | Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        compile: bool | Mapping[str, Any] = False,
        graph: bool = True,
        max_graphs: int = 8,
        **pieces: Any,
    ):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if not isinstance(schedule, bk.BernoulliSchedule):
            raise TypeError(f"schedule: expected a BernoulliSchedule, got {type(schedule).__name__}")
        self.conventions = (Conventions() if conventions is None else conventions).replace(**pieces)
        if len(latent_shape) < 2:
            raise ValueError(f"latent_shape: expected positions and channels, got {tuple(latent_shape)}")
        if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
            raise TypeError(f"autocast: expected a floating dtype or None, got {autocast!r}")
        self.denoiser = denoiser
        self.schedule = schedule
        self.latent_shape = tuple(bk.checks.integer("latent_shape", size, 1, 2**31 - 1) for size in latent_shape)
        self.null_cond = getattr(denoiser, "null_label", None) if null_cond is None else null_cond
        self.autocast, self.compile, self.graph = autocast, compile, graph
        self._device = None if device is None else torch.device(device)
        self._desk = Desk(self.conventions, schedule, self.latent_shape)
        self._execution: Execution | None = None
        self._graphs = GraphCache(bk.checks.integer("max_graphs", max_graphs, 1, 10**6))
        self._uncapturable: Hashable = None

    @property
    def device(self) -> torch.device:
        return device_of(self.denoiser) if self._device is None else self._device

    @property
    def graphs(self) -> list[GraphInfo]:
        """The captured graphs, the least recently used first."""
        return self._graphs.infos()

    def graph_bytes(self) -> int:
        """Device memory of all captured graphs: their buffers and the pool they share."""
        return sum(info.buffer_bytes for info in self.graphs) + self._graphs.pool_bytes()

    def clear_graphs(self) -> None:
        self._graphs.clear()

    def sample(self, num_samples: int, steps: int = 16, **options: Any) -> Tensor:
        """Draw `num_samples` latents: `run`, returning packed latents uint8 (B, *latent_shape[:-1], ceil(C / 8)), or, under the
        final "probability", P(x_0 = 1) float32 (B, *latent_shape). Arguments and errors as there."""
        samples = self.run(num_samples, steps, **options)
        return samples.latents if samples.probability is None else samples.probability

    def run(self, num_samples: int, steps: int = 16, **options: Any) -> Samples:
        """Run the reverse process: `launch`, with its arguments, and wait for the result.

        Raises: FloatingPointError naming the step when logits are not finite; TypeError, ValueError for wrong arguments.
        """
        samples, check = self.launch(num_samples, steps, **options)
        check()
        return samples

    @torch.no_grad()
    def launch(
        self,
        num_samples: int,
        steps: int = 16,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        sample_offset: int = 0,
        cond: int | Tensor | Mapping[str, Tensor] | None = None,
        null_cond: int | Tensor | Mapping[str, Tensor] | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        keep_mask: Tensor | None = None,
        keep_bits: Tensor | None = None,
        start: Tensor | None = None,
        hook_inputs: Mapping[str, Tensor] | None = None,
        history: bool = False,
        batch_size: int | None = None,
        callback: Callable[[StepInfo], None] | None = None,
    ) -> tuple[Samples, Callable[[], None]]:
        """Start the reverse process, so that more work for the device can follow without a wait.

        Args:
            num_samples: B >= 0.
            steps: S, 1..T, spaced as the conventions say; or give `timesteps` yourself, strictly descending in 1..T.
            temperature: > 0; divides the logits.
            seed, sample_offset: sample i depends only on (seed, sample_offset + i), whatever the batches and the device.
            cond: (B, ...) one condition a sample, a single int for all, or named tensors (passed as keywords).
            null_cond: the condition that means "none", for this call; one for all samples or one a sample.
            guidance_scale: one number, or one a step, in the conventions' own sense (default: s of l_u + s (l_c - l_u)); another
                value than the neutral one needs `cond` and, in one batched call, a null condition.
            keep_mask, keep_bits: inpainting: packed bits (B, ...) or for all samples: where the mask is 1, the bits are kept
                before the first and after every step.
            start: packed x_t of the first timestep (B, ...) or for all samples, instead of fair coin flips.
            hook_inputs: tensors (B, ...) that the conventions' hook asks for.
            history: keep the state before the first and after every step.
            batch_size: at most so many samples at once.
            callback: called after every step with a `StepInfo`.

        Returns: the samples, and a function that waits for them and raises FloatingPointError, naming the step, when logits were
        not finite: call it before they are used for good. On a CPU that is raised at once.

        Raises: TypeError, ValueError for wrong arguments.
        """
        device = self.device
        job = self._desk.job(
            num_samples,
            steps,
            timesteps=timesteps,
            temperature=temperature,
            seed=seed,
            sample_offset=sample_offset,
            cond=cond,
            null_cond=self.null_cond if null_cond is None else null_cond,
            guidance_scale=guidance_scale,
            keep_mask=keep_mask,
            keep_bits=keep_bits,
            start=start,
            hook_inputs=hook_inputs,
            history=history,
            device=device,
        )
        size = num_samples if batch_size is None else bk.checks.integer("batch_size", batch_size, 1, 2**40)
        execution = self._prepare(device)
        with execution.anatomy.evaluating():
            parts = [self._batch(job, first, plan, inputs, execution, callback) for first, plan, inputs in job.batches(size)]

        def check() -> None:
            for _, counts in parts:
                _check_finite(counts, job.timesteps)

        return _join([samples for samples, _ in parts], job), check

    def _prepare(self, device: torch.device) -> Execution:
        """The denoiser, compiled if so, on the device where its weights are now."""
        if self._execution is None or not self._execution.serves(self.denoiser, device):
            self._execution = Execution(self.denoiser, device, self.autocast, self.compile)
        return self._execution

    def _batch(
        self,
        job: Job,
        first: int,
        plan: Plan,
        inputs: Inputs,
        execution: Execution,
        callback: Callable[[StepInfo], None] | None,
    ) -> tuple[Samples, Tensor]:
        """The samples of one batch, and how many logits were not finite in each step."""

        def check(counts: Tensor) -> None:
            _check_finite(counts, job.timesteps)

        def report(i: int, x: Tensor) -> None:
            if callback is not None:
                callback(StepInfo(i, plan.num_steps, job.timesteps[i], first, len(x), x))

        loop = None
        if self.graph and callback is None and execution.device.type == "cuda":
            loop = self._replay(plan, inputs, execution)
        if loop is None:
            loop = Loop(plan, self.conventions, self.latent_shape, execution, inputs)
            loop.load(inputs)
            # elsewhere than on a CPU reading the counter would stall the loop: it is read once, at the end
            loop.run(None if callback is None else report, check if execution.device.type == "cpu" else None)
        # a captured loop's tensors are written again by its next replay
        hook = {name: buffer.clone() for name, buffer in loop.hook_buffers.items()}
        return Samples(loop.x.clone(), _copied(loop.probability), _copied(loop.states), hook), loop.nonfinite.clone()

    def _replay(self, plan: Plan, inputs: Inputs, execution: Execution) -> Loop | None:
        """All steps as one graph; None, after a warning, where that cannot be."""
        fingerprint = _fingerprint(execution)
        captured = self._graphs.find(plan, fingerprint)
        if captured is None:
            if self._uncapturable == fingerprint:
                return None
            loop = Loop(plan, self.conventions, self.latent_shape, execution, inputs)
            try:
                captured = self._graphs.capture(plan, fingerprint, loop, inputs)
            except Uncapturable as error:
                self._uncapturable = fingerprint
                warnings.warn(f"FastSampler: sampling without a CUDA graph, more slowly: {error}", stacklevel=4)
                return None
        return captured.replay(inputs)


def _fingerprint(execution: Execution) -> Hashable:
    """What a captured graph takes for granted: the denoiser, where its weights are, settings that choose kernels."""
    settings = (
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        forced_backend(),
    )
    return (id(execution), *settings, *execution.anatomy.addresses())


def _check_finite(counts: Tensor, timesteps: list[int]) -> None:
    for i, count in enumerate(counts.tolist()):
        if count:
            raise FloatingPointError(f"denoiser: {count} logits are not finite at step {i} (timestep {timesteps[i]})")


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _join(parts: list[Samples], job: Job) -> Samples:
    """The batches as one; with none of them, empty tensors of the right shapes."""
    if not parts:
        pieces, shape = job.conventions, (0, *job.latent_shape)
        empty = torch.empty(shape, device=job.start.device) if pieces.final == "probability" else None
        states = job.start.new_empty(len(job.timesteps) + 1, *job.start.shape) if job.history else None
        return Samples(job.start, empty, states)
    if len(parts) == 1:
        return parts[0]

    def together(name: str, dim: int = 0) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim)

    hook = {
        name: torch.cat([part.hook[name] for part in parts]) if value.dim() > 1 else value
        for name, value in parts[0].hook.items()
    }
    return Samples(torch.cat([part.latents for part in parts]), together("probability"), together("states", 1), hook)
