"""haoosz/BiGR: the `BinaryDiffusion` that predicts the bits of one token inside a masked autoregressive model."""

from typing import Any

from torch import Tensor

import bldm_kernels as bk

from ..sampling import Call, Conventions, FastSampler
from .base import Accelerated, fresh_seed, has, keep_arguments, schedule_from, takes


class AcceleratedBiGR(Accelerated):
    """`sample` as BiGR has it: bits, or with `return_logits` the last step's probabilities, float32 (B N, C).

    To use it inside the model: `gpt.diffusion_processor.sample = bldm.accelerate(gpt.diffusion_processor).sample`.
    """

    @staticmethod
    def recognises(model: object) -> bool:
        fits = has(model, "_denoise_fn", "scheduler", "p_flip", "num_timesteps") and has(model._denoise_fn, "in_dim")  # type: ignore
        return fits and takes(model.sample, "temp", "sample_steps", "cond", "cfg_scale", "return_logits")  # type: ignore

    def _make(self, final: str) -> FastSampler:
        conventions = Conventions(
            prediction="flip" if self.model.p_flip else "x_0",
            final=final,
            time_label="t-1",
            state="bits",
            layout="flat",
            call=Call(("x",), {"time_steps": "time", "c": "cond"}),
            spacing="paper",
        )
        schedule = schedule_from(self.model.scheduler.k_final[1:])
        latent_shape = (1, self.model._denoise_fn.in_dim)
        return FastSampler(self.model._denoise_fn, schedule, latent_shape=latent_shape, conventions=conventions, **self.options)

    def sample(
        self,
        temp: float = 1.0,
        sample_steps: int | None = None,
        return_all: bool = False,
        cond: Tensor | None = None,
        mask: dict[str, Tensor] | None = None,
        cfg_scale: float | None = None,
        full: bool = False,
        return_logits: bool = False,
    ) -> Any:
        """float32 (B N, C); with `return_all` (the S + 1 states along dimension 0, None), as the original.

        cond: (2 B N, D), conditional rows first, then the unconditional ones. cfg_scale: s of l_u + s (l_c - l_u).
        """
        if cond is None or cond.dim() < 2 or len(cond) % 2:
            got = None if cond is None else tuple(cond.shape)
            raise ValueError(f"cond: expected conditional and unconditional rows, as many of each, got {got}")
        if cfg_scale is None:
            raise ValueError("cfg_scale: cond holds unconditional rows, expected a scale (1 for none), got None")
        final = "probability" if return_logits and not return_all else "threshold"
        sampler = self._sampler(final, lambda: self._make(final))
        conditional, unconditional = cond.chunk(2)
        run = sampler.run(
            len(conditional),
            self.model.num_timesteps if sample_steps is None else sample_steps,
            temperature=temp,
            seed=fresh_seed(),
            cond=conditional,
            null_cond=unconditional,
            guidance_scale=cfg_scale,
            history=return_all,
            **keep_arguments(mask, sampler.latent_shape[1:], sampler.latent_shape),
        )
        if run.probability is not None:
            return run.probability.flatten(1)
        states = run.latents if run.states is None else run.states.flatten(0, 1)
        bits = bk.unpack_bits(states, sampler.latent_shape[-1]).flatten(1)
        return (bits, None) if return_all else bits
