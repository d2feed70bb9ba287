"""The autoencoder's opponent: a patch discriminator with the hinge loss and the adaptive weight of VQGAN (Esser et al. 2021)."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .learner import Learner
from .options import TrainOptions


class PatchDiscriminator(nn.Module):
    """Convolutions that say of every patch of an image how real it looks (Isola et al. 2017), with GroupNorm: no statistics of
    the batch, so that it is the same on any number of processes.

    Args:
        image_size: pixels; up to three levels, as many as leave a grid of patches.
        in_channels: of an image.
        width: channels of the first level.
    """

    def __init__(self, image_size: int, in_channels: int, width: int = 64):
        super().__init__()
        levels = min(max(int(math.log2(image_size / 7)), 1), 3)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, levels + 1):
            before, after = width * min(2 ** (level - 1), 8), width * min(2**level, 8)
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(math.gcd(32, after), after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(after, 1, 4, 1, 1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> (B, 1, h, w), high for real patches."""
        return self.layers(images.to(next(self.parameters()).dtype))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator: (relu(1 - D(x)) + relu(1 + D(x'))) / 2."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|d reconstruction / d last| / (|d adversarial / d last| + 1e-4), at most 1e4: both losses pull at the decoder's last layer
    equally hard (Esser et al. 2021, eq. 7)."""
    one, other = (torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial))
    return (one / (other + 1e-4)).clamp(0, 1e4).detach()


class Adversary:
    """The discriminator in training: judges reconstructions from step `start` on, and learns after the autoencoder in each.

    Args:
        image_size, in_channels: of the images.
        options, accel: as the autoencoder's.
        start: first step.
        weight: of the adversarial term, before the adaptive weight.

    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(self, image_size: int, in_channels: int, options: TrainOptions, accel: Any, *, start: int, weight: float):
        # not compiled: a compiled backward pass runs once only, and this one runs for the adaptive weight too
        options = replace(options, compile=False)
        self.learner = Learner(PatchDiscriminator(image_size, in_channels), options, accel, betas=(0.5, 0.9))
        self.start, self.weight = start, weight
        self._seen: tuple[Tensor, Tensor] | None = None

    def generator_loss(self, x: Tensor, decoded: Tensor, reconstruction: Tensor, last: Tensor, step: int) -> dict[str, Tensor]:
        """{"gan": weighted term, "gan_weight": its adaptive factor}; {} before the start. Keeps the images for `learn`."""
        self._seen = None
        if step < self.start:
            return {}
        self._seen = (x, decoded.detach())
        judge = self.learner.model if self.learner.copy is None else self.learner.copy
        fixed = {name: p.detach() for name, p in judge.named_parameters()}  # only the autoencoder learns from this
        adversarial = -functional_call(judge, fixed, decoded).float().mean()
        factor = adaptive_weight(reconstruction, adversarial, last)
        return {"gan": self.weight * factor * adversarial, "gan_weight": factor}

    def learn(self, step: int, lr: float) -> dict[str, Tensor]:
        """One step of the discriminator on the images of the autoencoder's step."""
        if self._seen is None:
            return {}
        real, fake = self.learner.module(torch.cat(self._seen)).chunk(2)
        loss = hinge_loss(real, fake)
        self.learner.update(loss, step - self.start, lr)
        return {"discriminator": loss.detach()}
