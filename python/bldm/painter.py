"""Painter: what a model of images and an engine made from it have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from .sampling import FastSampler, StepInfo
from .text import TextEncoder


class Painter:
    """Samples, decodes and encodes, with a denoiser, an autoencoder and what was said about them in training."""

    autoencoder: Any
    denoiser: Any
    schedule: bk.BernoulliSchedule
    prediction: str
    class_names: list[str] | None
    text_encoder: str | None

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
        samples, check = self._sampler_by(rule).launch(
            num_samples,
            steps,
            cond=labels,
            guidance_scale=guidance_scale,
            seed=seed,
            temperature=temperature,
            batch_size=batch_size,
            callback=callback,
        )
        images = self.decode(samples.latents, batch_size=batch_size)
        check()  # behind the decoder's start, as it waits for the device
        return images

    def _sampler_by(self, rule: str) -> FastSampler:
        return self.sampler(rule=rule)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features of texts as this model takes them, on its device: (B, width), or (B, L, width) with cross attention.

        Raises: ValueError for a model that takes no text or does not say by which encoder; RuntimeError where the extra
        `bldm-kernels[text]` is not installed.
        """
        if self.denoiser.text_width is None:
            raise ValueError("text: this model takes no text")
        if self.text_encoder is None:
            raise ValueError("text: this model does not say which text encoder it was trained with; pass features of its texts")
        return TextEncoder(self.text_encoder, self.denoiser.positions.device).encode(texts, tokens=self.denoiser.cross_attention)

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
        parts = [self.autoencoder.decode(part) for part in latents.split(batch_size or max(len(latents), 1))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def encode(self, images: Tensor, *, seed: int | None = None) -> Tensor:
        """Images in [-1, 1] -> packed latents; Bernoulli bits with a seed, thresholded without."""
        return self.autoencoder.encode(images, seed=seed)
