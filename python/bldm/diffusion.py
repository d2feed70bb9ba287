"""BinaryLatentDiffusion: autoencoder, denoiser and schedule as one model that paints images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

from .autoencoder import BinaryAutoencoder
from .checkpoint import PretrainedModel
from .denoiser import BinaryDenoiser
from .sampling import FastSampler, StepInfo
from .text import TextEncoder


class BinaryLatentDiffusion(nn.Module, PretrainedModel):
    """A binary autoencoder with a Bernoulli diffusion over its bits (Wang et al., CVPR 2023).

    Args:
        autoencoder: arguments of `BinaryAutoencoder`.
        denoiser: arguments of `BinaryDenoiser`; positions, bits and steps default to the autoencoder's grid and `num_steps`.
        schedule: kind of the `BernoulliSchedule`.
        num_steps: T.
        prediction: "flip" or "x_0".
        class_names: names of the classes 0, 1, ... of a class-conditional model.
        text_encoder: name of the `bldm.text.TextEncoder` whose features a text-conditional model was trained with.
    """

    def __init__(
        self,
        autoencoder: dict[str, Any],
        denoiser: dict[str, Any],
        schedule: str = "linear",
        num_steps: int = 256,
        prediction: str = "flip",
        class_names: Sequence[str] | None = None,
        text_encoder: str | None = None,
    ):
        super().__init__()
        bk.checks.option("prediction", prediction, ("flip", "x_0"))
        self.autoencoder = BinaryAutoencoder(**autoencoder)
        *grid, num_bits = self.autoencoder.latent_shape
        fitting = {"num_positions": grid[0] * grid[1], "num_bits": num_bits, "num_steps": num_steps}
        self.denoiser = BinaryDenoiser(**{**fitting, **denoiser})
        self.schedule = bk.BernoulliSchedule(schedule, num_steps)
        self.prediction = prediction
        self.class_names = None if class_names is None else list(class_names)
        if self.class_names is not None and len(self.class_names) != (self.denoiser.num_classes or 0):
            raise ValueError(
                f"class_names: expected {self.denoiser.num_classes or 0} names, one a class, got {len(self.class_names)}"
            )
        if text_encoder is not None and self.denoiser.text_width is None:
            raise ValueError(f"text_encoder: this denoiser takes no text, expected None, got {text_encoder!r}")
        self.text_encoder = text_encoder

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, C): bits of one latent."""
        return tuple(self.autoencoder.latent_shape)

    def sampler(self, **options: Any) -> FastSampler:
        """A `FastSampler` over this model's latents; options as there (rule, final, device, autocast, ...)."""
        return FastSampler(self.denoiser, self.schedule, latent_shape=self.latent_shape, prediction=self.prediction, **options)

    def sample(
        self,
        num_samples: int,
        steps: int = 16,
        *,
        labels: int | Tensor | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        temperature: float = 1.0,
        rule: str = "plugin",
        batch_size: int | None = None,
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1]; arguments as in `FastSampler.sample`.

        `labels` is its condition: classes, or the features of texts for a denoiser that takes them (see `encode_text`).
        """
        self._check_labels(labels)
        latents = self.sampler(rule=rule).sample(
            num_samples,
            steps,
            cond=labels,
            guidance_scale=guidance_scale,
            seed=seed,
            temperature=temperature,
            batch_size=batch_size,
            callback=callback,
        )
        return self.decode(latents, batch_size=batch_size)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features of texts as this model takes them, on its device: (B, width), or (B, L, width) with cross attention.

        Raises: ValueError for a model that takes no text or does not say by which encoder; RuntimeError where the extra
        `bldm-kernels[text]` is not installed.
        """
        if self.denoiser.text_width is None:
            raise ValueError("text: this model takes no text")
        if self.text_encoder is None:
            raise ValueError("text: this model does not say which text encoder it was trained with; pass features of its texts")
        device = next(self.parameters()).device
        return TextEncoder(self.text_encoder, device).encode(texts, tokens=self.denoiser.cross_attention)

    def _check_labels(self, labels: int | Tensor | None) -> None:
        if labels is None or self.denoiser.text_width is not None:  # text is checked by the denoiser
            return
        if self.denoiser.num_classes is None:
            raise ValueError("labels: this model has no classes, expected None")
        values = bk.checks.tensor("labels", torch.as_tensor(labels), (torch.int64,))
        wrong = values[(values < 0) | (values >= self.denoiser.num_classes)]
        if len(wrong):
            raise ValueError(f"labels: expected classes 0..{self.denoiser.num_classes - 1}, got {int(wrong[0])}")

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Packed latents (B, h, w, P) -> images (B, channels, H, W) in [-1, 1]."""
        return torch.cat([self.autoencoder.decode(part) for part in latents.split(batch_size or max(len(latents), 1))])

    @torch.no_grad()
    def encode(self, images: Tensor, *, seed: int | None = None) -> Tensor:
        """Images in [-1, 1] -> packed latents; Bernoulli bits with a seed, thresholded without."""
        return self.autoencoder.encode(images, seed=seed)
