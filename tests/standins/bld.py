"""Like ZeWang95/BinaryLatentDiffusion."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .common import FixedLogits, of_ones, plugin


class Denoiser(nn.Module):
    """(x, label=None, time_steps=...): bits (B, N, C), a class or None, t - 1."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.logits = FixedLogits(math.prod(shape))

    def forward(self, x: Tensor, label: Tensor | None = None, time_steps: Tensor | None = None) -> Tensor:
        assert time_steps is not None and x.dim() == 3
        return self.logits(x, time_steps, None if label is None else label // 100 % 3).view_as(x)


class Scheduler(nn.Module):
    def __init__(self, num_timesteps: int, kind: str):
        super().__init__()
        u = np.arange(num_timesteps + 1) / num_timesteps
        if kind == "linear":
            k = np.cumprod([1.0] + [1 - 1 / (num_timesteps - t + 1) for t in range(1, num_timesteps + 1)])
        elif kind == "cos":
            k = (1 + np.cos(np.pi * u)) / 2
        else:
            o = 1 / (1 + np.exp(-3 * u / 0.8))
            k = np.clip((o[-1] - o) / (o[-1] - 0.5), 0, 1)
        self.register_buffer("k_final", torch.from_numpy(k).float())


class BinaryDiffusion(nn.Module):
    def __init__(self, kind: str = "linear", p_flip: bool = True, dataset: str = "churches", num_timesteps: int = 12):
        super().__init__()
        self.shape, self.codebook_size, self.num_timesteps = (1, 1, 2), 3, num_timesteps
        self.p_flip, self.dataset = p_flip, dataset
        self._denoise_fn = Denoiser((2, 3))
        self.scheduler = Scheduler(num_timesteps, kind)

    @torch.no_grad()
    def sample(
        self,
        temp: float = 1.0,
        sample_steps: int | None = None,
        b: int = 5,
        return_all: bool = False,
        label: Any = None,
        mask: dict[str, Tensor] | None = None,
        guidance: float | None = None,
        full: bool = False,
    ) -> Tensor:
        assert sample_steps is not None
        spaced = (np.linspace(0, 1, sample_steps) * (self.num_timesteps - 1)).astype(int) + 1
        timesteps = [int(t) for t in spaced[::-1]]
        conditional = self.dataset.startswith(("imagenet", "laion"))
        if self.dataset == "imagenet":
            label = torch.arange(b) * 100 if label is None else torch.full((b,), label)

        def kept(x: Tensor) -> Tensor:
            return x if mask is None else torch.where(mask["mask"] == 1, mask["latent"], x)

        x = kept(torch.randint(0, 2, (b, math.prod(self.shape), self.codebook_size)).float())
        states = [x]
        for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
            time = torch.full((b,), t - 1)
            logits = self._denoise_fn(x, label, time_steps=time) if conditional else self._denoise_fn(x, time_steps=time)
            if conditional and guidance is not None:
                logits = (1 + guidance) * logits - guidance * self._denoise_fn(x, None, time_steps=time)
            p = of_ones(torch.sigmoid(logits / temp), x, self.p_flip)
            if t == 1:
                x = (p > 0.5).float()
            else:
                k = self.scheduler.k_final
                x = torch.bernoulli(plugin(p, x, float(k[t]), float(k[s])))
            x = kept(x)
            states.append(x)
        return torch.cat(states) if return_all else x
