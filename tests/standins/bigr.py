"""Like the diffusion head of haoosz/BiGR."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bld import Scheduler
from .common import FixedLogits, of_ones, plugin


class Denoiser(nn.Module):
    """(x, time_steps, c): bits (B N, C), t - 1, features (B N, D). It makes its frequencies on the CPU, as theirs does."""

    def __init__(self, num_bits: int, num_features: int = 4):
        super().__init__()
        self.in_dim = num_bits
        self.logits = FixedLogits(num_bits, seed=1)
        weight = torch.randn(num_features, num_bits, generator=torch.Generator().manual_seed(2))
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, time_steps: Tensor, c: Tensor) -> Tensor:
        frequency = torch.arange(1, 2, dtype=torch.float32).to(device=x.device)
        return self.logits(x, time_steps * frequency) + c @ self.weight


class BinaryDiffusion(nn.Module):
    def __init__(self, p_flip: bool = True, num_timesteps: int = 12):
        super().__init__()
        self.num_timesteps, self.p_flip = num_timesteps, p_flip
        self._denoise_fn = Denoiser(6)
        self.scheduler = Scheduler(num_timesteps, "linear")

    @torch.no_grad()
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
        assert sample_steps is not None and cond is not None and cfg_scale is not None
        spaced = (np.linspace(0, 1, sample_steps) * (self.num_timesteps - 1)).astype(int) + 1
        timesteps = [int(t) for t in spaced[::-1]]
        with_cond, without = cond.chunk(2)

        def kept(x: Tensor) -> Tensor:
            return x if mask is None else torch.where(mask["mask"] == 1, mask["latent"], x)

        x = kept(torch.randint(0, 2, (len(with_cond), self._denoise_fn.in_dim)).float())
        states = [x]
        for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
            time = torch.full((len(x),), t - 1)
            uncond = self._denoise_fn(x, time_steps=time, c=without)
            logits = uncond + cfg_scale * (self._denoise_fn(x, time_steps=time, c=with_cond) - uncond)
            p = of_ones(torch.sigmoid(logits / temp), x, self.p_flip)
            k = self.scheduler.k_final
            x = (p > 0.5).float() if t == 1 else torch.bernoulli(plugin(p, x, float(k[t]), float(k[s])))
            x = kept(x)
            states.append(x)
        if return_all:
            return torch.cat(states), None
        return p if return_logits else x
