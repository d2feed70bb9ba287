"""What a denoiser is given: packed latents as a tensor of some form and layout, and its answer back in ours.

Latents are (B, *latent_shape) with the packed dimension last. A model that wants its bits in that very order, whatever it calls
its dimensions, has the layout "channels-last"; only one that wants the packed dimension first needs "channels-first".
"""

import math

import torch
from torch import Tensor

import bldm_kernels as bk

FORMS = ("packed", "bits", "signs")
LAYOUTS = ("channels-last", "channels-first", "flat")


def to_state(x: Tensor, latent_shape: tuple[int, ...], form: str, layout: str, dtype: torch.dtype) -> Tensor:
    """Packed x_t -> the denoiser's input: packed bytes, 0 and 1, or -1 and 1, of `dtype`."""
    if form == "packed":
        return x
    bits = bk.unpack_bits(x, latent_shape[-1], dtype, dim=1 if layout == "channels-first" else -1)
    if form == "signs":
        bits = bits * 2 - 1
    return bits.flatten(1) if layout == "flat" else bits


def from_state(values: Tensor, latent_shape: tuple[int, ...], layout: str) -> Tensor:
    """A tensor in the denoiser's layout -> (B, *latent_shape)."""
    if layout == "channels-first":
        return values.movedim(1, -1)
    return values.reshape(values.shape[0], *latent_shape)


def to_layout(values: Tensor, layout: str) -> Tensor:
    """The inverse of `from_state`: (B, *latent_shape) -> the denoiser's layout."""
    if layout == "channels-first":
        return values.movedim(-1, 1)
    return values.flatten(1) if layout == "flat" else values


def logits_of(logits: object, num_samples: int, latent_shape: tuple[int, ...], layout: str) -> Tensor:
    """Check the denoiser's logits and bring them to (B, *latent_shape). Raises TypeError, ValueError."""
    logits = bk.checks.floating("denoiser: logits", logits, min_dim=2)
    *positions, channels = latent_shape
    expected: tuple[int, ...] = (num_samples, *latent_shape)
    if layout == "channels-first":
        expected = (num_samples, channels, *positions)
        fits = tuple(logits.shape) == expected
    elif layout == "flat":
        expected = (num_samples, math.prod(latent_shape))
        fits = tuple(logits.shape) == expected
    else:  # the positions between may come flat, as (B, N, C)
        fits = (logits.shape[0], logits.shape[-1]) == (num_samples, channels) and logits.numel() == math.prod(expected)
    if not fits:
        raise ValueError(f"denoiser: expected logits of shape {expected}, got {tuple(logits.shape)}")
    return from_state(logits, latent_shape, layout)
