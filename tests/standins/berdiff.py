"""Like takimailto/BerDiff, and JuliaWolleb/Anomaly_berdiff."""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .common import FixedLogits, of_ones, plugin


class Model(nn.Module):
    """(x, timesteps, img=...) -> probabilities (B, C, H, W): the sigmoid is inside."""

    def __init__(self, shape: tuple[int, ...] = (1, 2, 3)):
        super().__init__()
        self.logits = FixedLogits(math.prod(shape), seed=3)

    def forward(self, x: Tensor, timesteps: Tensor, img: Tensor | None = None) -> Tensor:
        said = self.logits(x, timesteps).view_as(x)
        return torch.sigmoid(said if img is None else said + img)


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


def beta_table(name: str, num_timesteps: int) -> np.ndarray:
    """Named schedules of 1 - k_t / k_{t-1}."""
    if name == "linear":
        return np.linspace(1e-4, 0.02, num_timesteps) * 1000 / num_timesteps
    if name == "alpha_bar_linear":
        return 1 / np.arange(num_timesteps, 0, -1)
    power = {"cosine": 1, "cosine2": 2}[name]
    bar = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** power
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


class BinomialDiffusion:
    """0-based t: alphas_cumprod[t] is k_{t+1}. With `use_timesteps` it is respaced, and the model is told the original index."""

    def __init__(
        self, betas: np.ndarray, kind: str = "START_X", rescale: bool = False, use_timesteps: Sequence[int] | None = None
    ):
        self.model_mean_type, self.rescale_timesteps = ModelMeanType[kind], rescale
        bar = np.cumprod(1 - betas)
        self.original_num_steps = len(bar)
        if use_timesteps is not None:
            self.timestep_map = sorted(use_timesteps)
            bar = bar[self.timestep_map]
        self.alphas_cumprod = bar
        self.num_timesteps = len(bar)

    def keep(self, t: int) -> float:
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def q_mean(self, x_start: Tensor, t: Tensor) -> Tensor:
        k = torch.from_numpy(self.alphas_cumprod).to(t.device)[t].float().view(-1, *[1] * (x_start.dim() - 1))
        return k * x_start + (1 - k) / 2

    def say(self, model: Any, x: Tensor, t: int, model_kwargs: dict[str, Any] | None) -> Tensor:
        label = self.timestep_map[t] if hasattr(self, "timestep_map") else t
        time = torch.full((len(x),), label, device=x.device)
        return model(x, time * (1000.0 / self.original_num_steps) if self.rescale_timesteps else time, **(model_kwargs or {}))

    def _loop(
        self, ddim: bool, model: Any, shape: Any, noise: Any, denoised_fn: Callable[[Tensor], Tensor] | None, model_kwargs: Any
    ) -> Tensor:
        x = torch.randint(0, 2, shape).float() if noise is None else noise
        with torch.no_grad():
            for t in range(self.num_timesteps - 1, -1, -1):
                says = self.say(model, x, t, model_kwargs)
                k_t, k_s = self.keep(t), self.keep(t - 1)
                if self.model_mean_type is ModelMeanType.PREVIOUS_X:
                    mean = says
                else:
                    p = of_ones(says, x, self.model_mean_type is ModelMeanType.EPSILON)
                    p = p if denoised_fn is None else denoised_fn(p)
                    sigma = (1 - k_s) / (1 - k_t)
                    mean = sigma * x + (1 - sigma) * p if ddim else plugin(p, x, k_t, k_s)
                    mean = p if t == 0 else mean
                x = torch.bernoulli(mean.clamp(0, 1)) if t else mean
        return x

    def p_sample_loop(
        self,
        model: Any,
        shape: Any,
        noise: Any = None,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        return self._loop(False, model, shape, noise, denoised_fn, model_kwargs)

    def ddim_sample_loop(
        self,
        model: Any,
        shape: Any,
        noise: Any = None,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        return self._loop(True, model, shape, noise, denoised_fn, model_kwargs)


class AnomalyDiffusion(BinomialDiffusion):
    """The mask is a sample's own here, so that many samples are drawn at once; theirs is used with one."""

    def ddim_sample_loop_anomaly(
        self,
        model: Any,
        shape: Any,
        img: Tensor,
        prob_threshold: float = 0.5,
        noise_level: int = 200,
        mask: Tensor | None = None,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(shape) if mask is None else mask.clone()
        x = torch.bernoulli(self.q_mean(img, torch.full((len(img),), noise_level)))
        with torch.no_grad():
            for t in range(noise_level - 1, -1, -1):
                says = self.say(model, x, t, model_kwargs)
                p = of_ones(says, x, self.model_mean_type is ModelMeanType.EPSILON)
                if t == 0:
                    return p, mask
                mask[says > prob_threshold] = 1
                x = torch.bernoulli(plugin(p * mask + img * (1 - mask), x, self.keep(t), self.keep(t - 1)).clamp(0, 1))
        raise AssertionError("the last t is 0")
