"""takimailto/BerDiff: `BinomialDiffusion` and `SpacedDiffusion`, around UNets that answer probabilities (B, C, H, W)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

from ..sampling import Call, Conventions, Denoised, FastSampler, Hook, original, rescaled
from .base import Accelerated, check_bits, fresh_seed, has, schedule_from, takes

PREDICTIONS = {"EPSILON": "flip", "START_X": "x_0", "PREVIOUS_X": "x_0"}


class AcceleratedBerDiff(Accelerated):
    """`p_sample_loop` and `ddim_sample_loop`; what comes back is the last step's soft prediction, float32 `shape`."""

    @staticmethod
    def recognises(model: object) -> bool:
        fits = has(model, "alphas_cumprod", "model_mean_type", "rescale_timesteps", "num_timesteps", "ddim_sample_loop")
        return fits and takes(model.p_sample_loop, "model", "shape", "noise", "denoised_fn", "model_kwargs")  # type: ignore

    def _conventions(self, rule: str, hook: Hook | None) -> Conventions:
        kind = self.model.model_mean_type.name
        if kind not in PREDICTIONS or (kind == "PREVIOUS_X" and (rule != "plugin" or hook is not None)):
            raise ValueError(f"model_mean_type: {kind} cannot be sampled under the rule {rule!r}, or with a function of x_0")
        label: Callable[[int], int | float] = lambda t: t - 1  # noqa: E731
        steps = self.model.num_timesteps
        if hasattr(self.model, "timestep_map"):  # a respaced process tells the original time
            label, steps = original(self.model.timestep_map), self.model.original_num_steps
        return Conventions(
            prediction=PREDICTIONS[kind],
            output="probabilities",
            rule="sample" if kind == "PREVIOUS_X" else rule,
            final="probability",
            time_label=rescaled(label, 1000.0 / steps) if self.model.rescale_timesteps else label,
            state="bits",
            call=Call(("x", "time", "cond")),
            hook=hook,
        )

    def _sampler_of(self, model: Any, shape: Sequence[int], rule: str, hook_key: object, hook: Hook | None) -> FastSampler:
        def make() -> FastSampler:
            schedule = schedule_from(torch.as_tensor(self.model.alphas_cumprod))
            latent_shape = tuple(shape[1:])  # packed along the last dimension: no layout to change
            conventions = self._conventions(rule, hook)
            return FastSampler(model, schedule, latent_shape=latent_shape, conventions=conventions, **self.options)

        return self._sampler((model, tuple(shape[1:]), rule, hook_key), make)

    def _loop(
        self,
        rule: str,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        model_kwargs: Mapping[str, Tensor] | None,
        device: torch.device | str | None,
    ) -> Tensor:
        hook = None if denoised_fn is None else Denoised(denoised_fn)
        sampler = self._sampler_of(model, shape, rule, denoised_fn, hook)
        if device is not None and isinstance(model, nn.Module) and torch.device(device).type != sampler.device.type:
            raise ValueError(f"device: expected {sampler.device} like model, got {device}")
        start = None
        if noise is not None:
            bk.checks.shape("noise", noise, shape, "like shape")
            start = bk.pack_bits(check_bits("noise", noise))
        return sampler.sample(
            shape[0],
            timesteps=range(self.model.num_timesteps, 0, -1),
            seed=fresh_seed(),
            cond=model_kwargs or None,
            start=start,
        )

    def p_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Ancestral sampling. model_kwargs: tensors of `shape[0]` rows. progress: there is none to show inside one graph."""
        return self._loop("plugin", model, shape, noise, denoised_fn, model_kwargs, device)

    def ddim_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """As `p_sample_loop`, with the rule Bern(sigma x_t + (1 - sigma) p), sigma = (1 - k_s) / (1 - k_t)."""
        return self._loop("ddim", model, shape, noise, denoised_fn, model_kwargs, device)
