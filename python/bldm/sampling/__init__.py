"""Sampling: `FastSampler` and the pieces that describe how a code base does Bernoulli diffusion (docs/sampling.md)."""

from .call import Call
from .conventions import Conventions
from .guidance import Guidance
from .hooks import Denoised, Hook, StickyMask
from .outputs import Output, chunk, decided_at, probabilities, two_class
from .sampler import FastSampler, Samples, StepInfo
from .time_labels import original, rescaled

__all__ = [
    "Call",
    "Conventions",
    "Denoised",
    "FastSampler",
    "Guidance",
    "Hook",
    "Output",
    "Samples",
    "StepInfo",
    "StickyMask",
    "chunk",
    "decided_at",
    "original",
    "probabilities",
    "rescaled",
    "two_class",
]
