"""FastSampler: the reverse process on packed bits, around any denoiser."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

import bldm_kernels as bk

from .latents import check_padding

TIME_LABELS: dict[str, Callable[[int], int]] = {"t": lambda t: t, "t-1": lambda t: t - 1}
STATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "packed": lambda x_t, num_bits: x_t,
    "bits": lambda x_t, num_bits: bk.unpack_bits(x_t, num_bits),
    "signs": lambda x_t, num_bits: bk.unpack_bits(x_t, num_bits) * 2 - 1,
}


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after every step: `x` is the packed state just made, safe to keep."""

    step: int
    num_steps: int
    timestep: int
    first_sample: int
    num_samples: int
    x: Tensor


class FastSampler:
    """Samples packed latents with any denoiser of a Bernoulli diffusion.

    Args:
        denoiser: callable (x_t, time (B,) int64[, cond]) -> logits (B, ..., C), x_t in the form that `state` names.
        schedule: the `BernoulliSchedule` it was trained with.
        latent_shape: bits of one latent, channels last, for example (16, 16, 64) or (256, 64).
        prediction: "flip" or "x_0": what the logits mean.
        rule: reverse rule of `BernoulliSchedule.coefficients`. `plugin` and `marginal` are different distributions.
        final: rule of the last step.
        time_label: "t" (1..T) or "t-1": what the denoiser is told.
        state: "packed" (uint8), "bits" (float 0 and 1) or "signs" (-1 and 1): what the denoiser is given.
        null_cond: the condition that means "none", for guidance (default: `denoiser.null_label` if there is one).
        device: where to sample (default: that of the denoiser's parameters or buffers, else the CPU).
        autocast: dtype to run the denoiser in, for example torch.bfloat16.

    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: bk.BernoulliSchedule,
        *,
        latent_shape: Sequence[int],
        prediction: str = "flip",
        rule: str = "plugin",
        final: str | None = "threshold",
        time_label: str = "t",
        state: str = "packed",
        null_cond: int | Tensor | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
    ):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if not isinstance(schedule, bk.BernoulliSchedule):
            raise TypeError(f"schedule: expected a BernoulliSchedule, got {type(schedule).__name__}")
        bk.checks.option("prediction", prediction, ("flip", "x_0"))
        bk.checks.option("time_label", time_label, TIME_LABELS)
        bk.checks.option("state", state, STATES)
        schedule.coefficients([1], rule, final)  # rejects an unknown rule here rather than in the first call
        if len(latent_shape) < 2:
            raise ValueError(f"latent_shape: expected positions and channels, got {tuple(latent_shape)}")
        if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
            raise TypeError(f"autocast: expected a floating dtype or None, got {autocast!r}")
        self.denoiser = denoiser
        self.schedule = schedule
        self.latent_shape = tuple(bk.checks.integer("latent_shape", size, 1, 2**31 - 1) for size in latent_shape)
        self.prediction = prediction
        self.rule = rule
        self.final = final
        self.time_label = time_label
        self.state = state
        self.null_cond = getattr(denoiser, "null_label", None) if null_cond is None else null_cond
        self.autocast = autocast
        self._device = None if device is None else torch.device(device)

    @property
    def device(self) -> torch.device:
        if self._device is not None:
            return self._device
        if not isinstance(self.denoiser, nn.Module):
            return torch.device("cpu")
        first = next(chain(self.denoiser.parameters(), self.denoiser.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        steps: int = 16,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        sample_offset: int = 0,
        cond: int | Tensor | None = None,
        guidance_scale: float = 1.0,
        keep_mask: Tensor | None = None,
        keep_bits: Tensor | None = None,
        batch_size: int | None = None,
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Draw `num_samples` latents.

        Args:
            num_samples: B >= 0.
            steps: S, 1..T, spaced as the reference code does; or give `timesteps` yourself, strictly descending in 1..T.
            temperature: > 0; divides the logits.
            seed, sample_offset: sample i depends only on (seed, sample_offset + i), whatever the batches and the device.
            cond: (B, ...) one condition a sample, or a single int for all.
            guidance_scale: s of l_u + s (l_c - l_u); another value than 1 needs `cond` and a null condition.
            keep_mask, keep_bits: inpainting: packed bits (B, ...) or for all samples; where the mask is 1, the bits are kept
                before the first and after every step.
            batch_size: at most so many samples at once.
            callback: called after every step with a `StepInfo`.

        Returns: packed latents uint8 (B, *latent_shape[:-1], ceil(C / 8)).

        Raises: FloatingPointError naming the step when logits are not finite; TypeError, ValueError for wrong arguments.
        """
        num_samples = bk.checks.integer("num_samples", num_samples, 0, 2**40)
        batch_size = num_samples if batch_size is None else bk.checks.integer("batch_size", batch_size, 1, 2**40)
        chosen = self._choose_timesteps(steps, timesteps)
        run = _Run(
            timesteps=chosen,
            coefficients=self.schedule.coefficients(chosen, self.rule, self.final).to(self.device),
            temperature=bk.checks.positive("temperature", temperature),
            seed=seed,
            guidance_scale=bk.checks.real("guidance_scale", guidance_scale),
            callback=callback,
        )
        cond = self._check_condition(cond, num_samples, guidance_scale)
        mask = self._check_kept("keep_mask", keep_mask, num_samples)
        kept = self._check_kept("keep_bits", keep_bits, num_samples)
        if (mask is None) != (kept is None):
            raise ValueError("keep_mask, keep_bits: expected both or neither")
        if kept is not None:
            check_padding("keep_bits", kept, self.latent_shape[-1])

        latents = bk.random_bits(num_samples, self.latent_shape, seed=seed, sample_offset=sample_offset, device=self.device)
        with _evaluating(self.denoiser):
            for first in range(0, num_samples, max(batch_size, 1)):
                batch = slice(first, first + batch_size)
                pick = (x if x is None else x[batch].contiguous() for x in (cond, mask, kept))
                latents[batch] = self._reverse(run, latents[batch], first, sample_offset + first, *pick)
        return latents

    def _choose_timesteps(self, steps: int, timesteps: Sequence[int] | Tensor | None) -> list[int]:
        if timesteps is None:
            return self.schedule.timesteps(bk.checks.integer("steps", steps, 1, self.schedule.num_steps))
        chosen = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        return [bk.checks.integer("timesteps", t, 1, self.schedule.num_steps) for t in chosen]

    def _reverse(
        self,
        run: "_Run",
        x: Tensor,
        first: int,
        sample_offset: int,
        cond: Tensor | None,
        keep_mask: Tensor | None,
        keep_bits: Tensor | None,
    ) -> Tensor:
        """The reverse process of one batch, from x_T to x_0."""
        if keep_mask is not None and keep_bits is not None:
            x = (x & ~keep_mask) | (keep_bits & keep_mask)
        nonfinite = torch.zeros(len(run.timesteps), dtype=torch.int32, device=x.device)
        for i, timestep in enumerate(run.timesteps):
            logits, uncond_logits = self._logits(x, timestep, cond, run.guidance_scale)
            x = bk.flip_step(
                logits,
                x,
                run.coefficients[i],
                seed=run.seed,
                step=i,
                sample_offset=sample_offset,
                temperature=run.temperature,
                prediction=self.prediction,
                uncond_logits=uncond_logits,
                guidance_scale=run.guidance_scale if uncond_logits is not None else 1.0,
                keep_mask=keep_mask,
                keep_bits=keep_bits,
                nonfinite=nonfinite[i : i + 1],
            )
            if x.device.type == "cpu":  # elsewhere reading the counter would stall the loop: it is read once, at the end
                self._check_finite(run, nonfinite[: i + 1])
            if run.callback is not None:
                run.callback(StepInfo(i, len(run.timesteps), timestep, first, len(x), x))
        self._check_finite(run, nonfinite)
        return x

    def _logits(self, x: Tensor, timestep: int, cond: Tensor | None, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """Logits with the condition and, when guided, without: both in one call of the denoiser."""
        guided = guidance_scale != 1.0
        state = STATES[self.state](torch.cat([x, x]) if guided else x, self.latent_shape[-1])
        time = torch.full((len(state),), TIME_LABELS[self.time_label](timestep), device=x.device)
        if cond is not None and guided:
            null = torch.as_tensor(self.null_cond, device=x.device).to(cond.dtype)
            cond = torch.cat([cond, null.expand_as(cond)])
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.denoiser(state, time) if cond is None else self.denoiser(state, time, cond)
        bk.checks.floating("denoiser: logits", logits, min_dim=2)
        expected = (len(state), *self.latent_shape)
        ends = (logits.shape[0], logits.shape[-1])  # the positions between may come flat, as (B, N, C)
        if ends != (expected[0], expected[-1]) or logits.numel() != math.prod(expected):
            raise ValueError(f"denoiser: expected logits of shape {expected}, got {tuple(logits.shape)}")
        logits = logits.reshape(expected)
        return (logits[: len(x)], logits[len(x) :]) if guided else (logits, None)

    def _check_finite(self, run: "_Run", nonfinite: Tensor) -> None:
        bad = nonfinite.tolist()
        for i, count in enumerate(bad):
            if count:
                raise FloatingPointError(f"denoiser: {count} logits are not finite at step {i} (timestep {run.timesteps[i]})")

    def _check_condition(self, cond: int | Tensor | None, num_samples: int, guidance_scale: float) -> Tensor | None:
        if cond is None:
            if guidance_scale != 1.0:
                raise ValueError(f"guidance_scale: {guidance_scale} needs a condition, but cond is None")
            return None
        if guidance_scale != 1.0 and self.null_cond is None:
            raise ValueError(f"guidance_scale: {guidance_scale} needs a null condition, but null_cond is None")
        if not isinstance(cond, Tensor):
            cond = torch.tensor(bk.checks.integer("cond", cond, 0, 2**63 - 1))
        cond = cond.to(self.device)
        if cond.dim() == 0:
            return cond.expand(num_samples)
        if cond.shape[0] != num_samples:
            raise ValueError(f"cond: expected {num_samples} conditions, one a sample, got shape {tuple(cond.shape)}")
        return cond

    def _check_kept(self, name: str, value: Tensor | None, num_samples: int) -> Tensor | None:
        if value is None:
            return None
        bk.checks.packed(name, value, min_dim=1)
        item = (*self.latent_shape[:-1], (self.latent_shape[-1] + 7) // 8)
        if tuple(value.shape) not in (item, (num_samples, *item)):
            raise ValueError(
                f"{name}: expected packed bits of shape {item} for all samples, or {(num_samples, *item)}, "
                f"got {tuple(value.shape)}"
            )
        return value.to(self.device).expand(num_samples, *item)


@dataclass(frozen=True)
class _Run:
    """What all batches of one `sample` call share."""

    timesteps: list[int]
    coefficients: Tensor
    temperature: float
    seed: int
    guidance_scale: float
    callback: Callable[[StepInfo], None] | None


@contextmanager
def _evaluating(denoiser: object) -> Iterator[None]:
    """Dropout off while sampling; afterwards every part is back in the mode it was in."""
    training = [part for part in denoiser.modules() if part.training] if isinstance(denoiser, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
