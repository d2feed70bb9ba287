"""ZeWang95/BinaryLatentDiffusion: the `BinaryDiffusion` of the paper's own code (Wang et al. 2023)."""

import math
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..sampling import Call, Conventions, FastSampler, Guidance
from .base import Accelerated, fresh_seed, has, keep_arguments, schedule_from, takes


class AcceleratedBLD(Accelerated):
    """`sample` as the paper's code has it; bits float32 (b, N, C) on the denoiser's device."""

    @staticmethod
    def recognises(model: object) -> bool:
        fits = has(model, "_denoise_fn", "scheduler", "p_flip", "shape", "codebook_size", "num_timesteps", "dataset")
        return fits and has(model.scheduler, "k_final") and takes(model.sample, "temp", "sample_steps", "b", "guidance")  # type: ignore

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        self.conditional = model.dataset.startswith(("imagenet", "laion"))

    def _make(self) -> FastSampler:
        conventions = Conventions(
            prediction="flip" if self.model.p_flip else "x_0",
            time_label="t-1",
            state="bits",
            call=Call(("x", "cond"), {"time_steps": "time"}),
            spacing="paper",
            guidance=Guidance(calls=2, convention="g"),  # the unconditional call has a token less
        )
        latent_shape = (math.prod(self.model.shape), self.model.codebook_size)
        schedule = schedule_from(self.model.scheduler.k_final[1:])
        return FastSampler(self.model._denoise_fn, schedule, latent_shape=latent_shape, conventions=conventions, **self.options)

    def sample(
        self,
        temp: float = 1.0,
        sample_steps: int | None = None,
        b: int = 5,
        return_all: bool = False,
        label: int | Tensor | None = None,
        mask: dict[str, Tensor] | None = None,
        guidance: float | None = None,
        full: bool = False,
    ) -> Tensor:
        """Bits float32 (b, N, C); with `return_all` the S + 1 states along dimension 0.

        label: what the denoiser takes; one class for all, or None, for the data set "imagenet". mask: {"mask", "latent"} of zeros
        and ones that expand to (N, C), 1 = keep. guidance: g of (1 + g) l_c - g l_u. sample_steps=None: every timestep.
        """
        sampler = self._sampler("sample", self._make)
        if not self.conditional and (label is not None or guidance is not None):
            name, value = ("guidance", guidance) if label is None else ("label", label)
            raise ValueError(f"{name}: {value!r} needs a condition, but the data set {self.model.dataset!r} has none")
        if self.model.dataset == "imagenet":
            label = torch.arange(b) * 100 if label is None else torch.as_tensor(label)
        run = sampler.run(
            b,
            self.model.num_timesteps if sample_steps is None else sample_steps,
            temperature=temp,
            seed=fresh_seed(),
            cond=label,
            guidance_scale=guidance,
            history=return_all,
            **keep_arguments(mask, sampler.latent_shape, sampler.latent_shape),
        )
        states = run.latents if run.states is None else run.states.flatten(0, 1)
        return bk.unpack_bits(states, sampler.latent_shape[-1])
