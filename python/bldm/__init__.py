"""Binary latent diffusion: models, samplers, training and storage on top of bldm_kernels."""

from .autoencoder import BinaryAutoencoder
from .bundled import bundled_model
from .denoiser import BinaryDenoiser
from .diffusion import BinaryLatentDiffusion
from .latents import PackedLatents
from .sampler import FastSampler, StepInfo

__version__ = "0.1.0"

__all__ = [
    "BinaryAutoencoder",
    "BinaryDenoiser",
    "BinaryLatentDiffusion",
    "FastSampler",
    "PackedLatents",
    "StepInfo",
    "bundled_model",
]
