"""Like ehoogeboom/multinomial_diffusion with two classes."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from .common import FixedLogits, plugin


class Denoiser(nn.Module):
    """(t, x): t counted from 0, classes int64 (B, ...) -> logits (B, 2, ...)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.logits = FixedLogits(math.prod(shape), seed=8)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        assert x.dtype == torch.int64
        one = self.logits(x, t).view(x.shape)
        return torch.stack([0.3 * one, 1.3 * one], dim=1)


class MultinomialDiffusion(nn.Module):
    def __init__(
        self, num_classes: int = 2, shape: tuple[int, ...] = (2, 3), num_timesteps: int = 4, parametrization: str = "x0"
    ):
        super().__init__()
        self.num_classes, self.shape, self.num_timesteps, self.parametrization = (
            num_classes,
            shape,
            num_timesteps,
            parametrization,
        )
        self._denoise_fn = Denoiser(shape)
        points = np.linspace(0, 1, num_timesteps + 1)
        bar = np.cos((points + 0.008) / 1.008 * np.pi / 2) ** 2
        alpha = np.sqrt(np.clip(bar[1:] / bar[:-1], 0.001, 1.0))
        self.register_buffer("log_cumprod_alpha", torch.from_numpy(np.cumsum(np.log(alpha))).float())

    @torch.no_grad()
    def sample_chain(self, num_samples: int) -> Tensor:
        """(T, B, *shape): entry t is the state that step t makes."""
        x = torch.randint(0, 2, (num_samples, *self.shape))
        states = []
        keep = [1.0, *self.log_cumprod_alpha.double().exp().tolist()]
        for t in range(self.num_timesteps - 1, -1, -1):
            p = torch.softmax(self._denoise_fn(torch.full((num_samples,), t), x), 1)[:, 1]
            if self.parametrization == "x0":
                p = plugin(p, x, keep[t + 1], keep[t])
            x = torch.bernoulli(p).long()
            states.append(x)
        return torch.stack(states[::-1])

    def sample(self, num_samples: int) -> Tensor:
        return self.sample_chain(num_samples)[0]
