"""Inference engines: a trained model, prepared once for the device it is on. Made by `optimize` of the models."""

from .denoiser import DenoiserEngine

__all__ = ["DenoiserEngine"]
