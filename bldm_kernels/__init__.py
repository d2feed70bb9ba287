"""Kernels for binary latent diffusion: packed bits, fused bit-flip sampling, Bernoulli posteriors and losses.

Every function is a PyTorch operator (`torch.ops.bldm.*`) with one reference and an implementation per backend:
`cuda` (ahead of time), `triton` (just in time), `cpu` (C++), `torch` (the reference). See `backends()`.
"""

from . import _diffusion_ops as _diffusion_ops  # registers torch.ops.bldm, with _ops
from . import checks, reference
from .backends import cpu as _cpu
from .backends import cuda as _cuda
from .backends import torch as _torch
from .backends import triton as _triton
from .dispatch import Backend, backends, force_from_environment, register_backend, use_backend
from .ops.binarize import binarize, binarize_straight_through
from .ops.bits import pack_bits, random_bits, unpack_bits
from .ops.diffusion import add_noise, flip_probability, flip_step
from .ops.embed import embed_bits
from .ops.hamming import hamming_distance, hamming_topk
from .ops.loss import flip_loss
from .schedule import BernoulliSchedule

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BernoulliSchedule",
    "add_noise",
    "backends",
    "binarize",
    "binarize_straight_through",
    "checks",
    "embed_bits",
    "flip_loss",
    "flip_probability",
    "flip_step",
    "hamming_distance",
    "hamming_topk",
    "pack_bits",
    "random_bits",
    "reference",
    "unpack_bits",
    "use_backend",
]

for _backend in (_cuda, _triton, _cpu, _torch):
    register_backend(_backend.load())
force_from_environment()
