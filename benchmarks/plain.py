"""The opponents: the same operations on float32 bits in plain PyTorch, as Bernoulli-diffusion code is usually written."""

import torch
from torch import Tensor


def step(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float, temperature: float = 1.0) -> Tensor:
    """The `plugin` reverse step for flip prediction: float bits in, float bits out (Wang et al. 2023, eq. 9)."""
    flip = torch.sigmoid(logits / temperature)
    x_0 = x_t * (1 - flip) + (1 - x_t) * flip
    prior = torch.stack([x_0, 1 - x_0], -1) * kept_s + (1 - kept_s) / 2
    likelihood = torch.stack([x_t, 1 - x_t], -1) * kappa + (1 - kappa) / 2
    joint = prior * likelihood
    return torch.bernoulli((joint / joint.sum(-1, keepdim=True))[..., 0])


def step_probability(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float) -> Tensor:
    """P(x_s != x_t) of the same step in float64, to check what is timed."""
    flip = torch.sigmoid(logits.double())
    moved = (1 - kappa) * ((1 - kept_s) / 2 + kept_s * flip)
    stayed = (1 + kappa) * (1 - (1 - kept_s) / 2 - kept_s * flip)
    return moved / (moved + stayed)


def add_noise(x_0: Tensor, kept: float) -> Tensor:
    return torch.bernoulli(x_0 * kept + (1 - kept) / 2)


def flip_loss(logits: Tensor, x_0: Tensor, x_t: Tensor) -> Tensor:
    target = (x_0 != x_t).to(logits.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
