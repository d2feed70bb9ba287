"""Inference engines: a trained model, prepared once for the device it is on. Made by `optimize` of the models."""

from .autoencoder import AutoencoderEngine
from .denoiser import DenoiserEngine
from .report import Part
from .system import DiffusionEngine

__all__ = ["AutoencoderEngine", "DenoiserEngine", "DiffusionEngine", "Part"]
