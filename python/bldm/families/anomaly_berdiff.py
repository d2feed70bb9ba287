"""JuliaWolleb/Anomaly_berdiff: BerDiff on the bits of an image, changed only where the model finds them unlikely."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..sampling import StickyMask
from ..sampling.outputs import CERTAIN
from .base import check_bits, fresh_seed, takes
from .berdiff import AcceleratedBerDiff


class AcceleratedAnomalyBerDiff(AcceleratedBerDiff):
    """`ddim_sample_loop_anomaly` besides BerDiff's loops. Each sample of a batch has a mask of its own (the original fills in
    the first one's only, and is used with batches of one)."""

    @staticmethod
    def recognises(model: object) -> bool:
        anomaly = getattr(model, "ddim_sample_loop_anomaly", None)
        fits = takes(anomaly, "model", "shape", "img", "prob_threshold", "noise_level", "mask")
        return fits and AcceleratedBerDiff.recognises(model)

    def ddim_sample_loop_anomaly(
        self,
        model: Any,
        shape: Sequence[int],
        img: Tensor,
        prob_threshold: float = 0.5,
        noise_level: int = 200,
        mask: Tensor | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(soft prediction float32 `shape`, mask float32 `shape`): noised to `noise_level` by the object's own `q_mean`, then
        denoised with the sticky mask (the rule is `plugin`, whatever the name says)."""
        if denoised_fn is not None:
            raise ValueError("denoised_fn: expected None together with the mask of img, got a function")
        steps = bk.checks.integer("noise_level", noise_level, 1, self.model.num_timesteps - 1)
        bk.checks.shape("img", check_bits("img", img), shape, "like shape")
        sampler = self._sampler_of(model, shape, "plugin", "anomaly", StickyMask())
        original = img.to(sampler.device).float()
        if mask is None:
            mask = torch.zeros_like(original)
        bk.checks.shape("mask", mask, shape, "like shape")
        seed = fresh_seed()
        level = torch.full((shape[0],), steps, dtype=torch.int64, device=sampler.device)
        noised = torch.logit(self.model.q_mean(original, level).float()).clamp(-CERTAIN, CERTAIN)
        run = sampler.run(
            shape[0],
            timesteps=range(steps, 0, -1),
            seed=seed,
            start=bk.binarize(noised, seed=seed),
            cond=model_kwargs or None,
            hook_inputs={"original": original, "mask": mask.float(), "threshold": torch.tensor([float(prob_threshold)])},
        )
        assert run.probability is not None
        return run.probability, run.hook["mask"]
