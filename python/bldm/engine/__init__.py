"""Inference engines: a trained model, prepared once for the device it is on. Made by `optimize` of the models."""

from .denoiser import DenoiserEngine
from .report import Part
from .system import DiffusionEngine

__all__ = ["DenoiserEngine", "DiffusionEngine", "Part"]
