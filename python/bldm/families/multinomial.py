"""ehoogeboom/multinomial_diffusion: `MultinomialDiffusion` with K = 2 classes (Hoogeboom et al. 2021)."""

from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..sampling import Call, Conventions, FastSampler
from .base import Accelerated, fresh_seed, has, schedule_from, takes


class AcceleratedMultinomial(Accelerated):
    """`sample` and `sample_chain` as the original; classes int64 (B, *shape), 0 or 1."""

    @staticmethod
    def recognises(model: object) -> bool:
        fits = has(model, "_denoise_fn", "log_cumprod_alpha", "num_classes", "shape", "parametrization", "num_timesteps")
        return fits and takes(model.sample, "num_samples")  # type: ignore[attr-defined]

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        if model.num_classes != 2:
            raise ValueError(f"num_classes: only two classes are bits, got {model.num_classes}")
        bk.checks.option("parametrization", model.parametrization, ("x0", "direct"))

    def _make(self) -> FastSampler:
        shape = tuple(self.model.shape)
        conventions = Conventions(
            prediction="x_0",
            output="two-class",
            rule="plugin" if self.model.parametrization == "x0" else "sample",
            final=None,  # the last step is drawn like the others
            time_label="t-1",
            state="bits",
            state_dtype=torch.int64,
            layout="channels-last" if len(shape) > 1 else "flat",
            call=Call(("time", "x")),
        )
        schedule = schedule_from(self.model.log_cumprod_alpha.double().exp())
        latent_shape = shape if len(shape) > 1 else (1, *shape)
        denoise, device = self.model._denoise_fn, self.model.log_cumprod_alpha.device
        return FastSampler(denoise, schedule, latent_shape=latent_shape, conventions=conventions, device=device, **self.options)

    def _run(self, num_samples: int, history: bool) -> Tensor:
        sampler = self._sampler("sample", self._make)
        steps = range(self.model.num_timesteps, 0, -1)
        run = sampler.run(num_samples, timesteps=steps, seed=fresh_seed(), history=history)
        packed = run.latents if run.states is None else run.states[1:].flip(0)
        bits = bk.unpack_bits(packed, sampler.latent_shape[-1], torch.int64)
        return bits.reshape(*packed.shape[: -len(sampler.latent_shape)], *self.model.shape)

    def sample(self, num_samples: int) -> Tensor:
        return self._run(num_samples, history=False)

    def sample_chain(self, num_samples: int) -> Tensor:
        """(T, B, *shape): entry t is the state after the step of timestep t, counted from 0."""
        return self._run(num_samples, history=True)
