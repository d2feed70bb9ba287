"""Like vkinakh/binary-diffusion-tabular."""

from typing import Any

import torch
from torch import Tensor, nn

from .common import FixedLogits


class Model(nn.Module):
    """(x, t, y=None) -> logits (B, D), or (B, 2 D): of the target, then of the mask. y is one-hot; zeros mean none."""

    def __init__(self, size: int, two_way: bool):
        super().__init__()
        self.parts = nn.ModuleList(FixedLogits(size, seed=5 + i) for i in range(2 if two_way else 1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        said = [part(x, t) + (0 if y is None else y @ part.labels[: y.shape[1]]) for part in self.parts]
        return torch.cat(said, 1)


def guided(x: Tensor, t: Tensor, y: Tensor, model: Any, scale: float) -> Tensor:
    """A model function with classifier-free guidance in one batch."""
    cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), y=torch.cat([y, torch.zeros_like(y)])).chunk(2)
    return uncond + scale * (cond - uncond)


class BinaryDiffusion1D(nn.Module):
    def __init__(self, target: str = "two_way", schedule: str = "linear", n_timesteps: int = 5, size: int = 6):
        super().__init__()
        self.target, self.size, self.n_timesteps = target, size, n_timesteps
        self.model = Model(size, target == "two_way")
        start, end = 1 / size, 0.5
        u = torch.linspace(0, 1, n_timesteps)
        if schedule == "linear":
            self.betas = start + (end - start) * u
        elif schedule == "quad":
            self.betas = (start**0.5 + (end**0.5 - start**0.5) * u) ** 2
        else:
            self.betas = start + (end - start) * torch.sigmoid(12 * u - 6)

    @torch.no_grad()
    def sample(
        self,
        *,
        model_fn: Any = None,
        y: Tensor | None = None,
        n: int,
        timesteps: Any = None,
        threshold: float = 0.5,
        strategy: str = "target",
    ) -> Tensor:
        x = torch.randint(0, 2, (n, self.size)).float()
        for t in reversed(range(self.n_timesteps) if timesteps is None else list(timesteps)):
            time = torch.full((n,), int(t))
            says = self.model(x, time, y=y) if model_fn is None else model_fn(x, time, y=y, model=self.model)
            chosen = strategy if self.target == "two_way" else self.target
            if chosen == "half-half":
                chosen = "mask" if t < self.n_timesteps // 2 else "target"
            if self.target == "two_way":
                says = says[:, : self.size] if chosen == "target" else says[:, self.size :]
            decided = (torch.sigmoid(says) > threshold).float()
            x = decided if chosen == "target" else (x - decided).abs()
            if t != 0:
                x = (x - torch.bernoulli(self.betas[t].expand_as(x))).abs()
        return x
