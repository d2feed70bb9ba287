"""Binary latent diffusion: models, samplers, training and storage on top of bldm_kernels."""

from typing import TYPE_CHECKING, Any

from .autoencoder import BinaryAutoencoder
from .bundled import bundled_model
from .denoiser import BinaryDenoiser
from .diffusion import BinaryLatentDiffusion
from .families import accelerate
from .latents import PackedLatents
from .profiling import profile
from .quantizer import BinaryQuantizer
from .sampling import Conventions, FastSampler, StepInfo
from .store import LatentStore

if TYPE_CHECKING:
    from .integrations.diffusers import BernoulliScheduler as BernoulliScheduler

__version__ = "0.1.0"

__all__ = [
    "BinaryAutoencoder",
    "BinaryDenoiser",
    "BinaryLatentDiffusion",
    "BinaryQuantizer",
    "Conventions",
    "FastSampler",
    "LatentStore",
    "PackedLatents",
    "StepInfo",
    "accelerate",
    "bundled_model",
    "profile",
]


def __getattr__(name: str) -> Any:
    """`bldm.BernoulliScheduler`, imported when first used: it needs diffusers, which not everybody has."""
    if name != "BernoulliScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .integrations.diffusers import BernoulliScheduler
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("bldm.BernoulliScheduler needs diffusers: pip install 'bldm-kernels[diffusers]'") from error
    return BernoulliScheduler
