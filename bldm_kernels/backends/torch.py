"""Backend `torch`: the reference, on any device and in float64; every kernel copies its result into `out`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import Backend


def _scalar(value: int, tensor: Tensor | None, like: Tensor) -> Tensor:
    """A seed or step as a one-element int64 tensor: the device's own if there is one."""
    return torch.tensor([value], device=like.device) if tensor is None else tensor.view(1)


def _copying(function: Callable[..., Any]) -> Callable[..., None]:
    """A reference function whose arguments are already the canonical ones."""

    def kernel(*args: Any) -> None:
        *inputs, out = args
        out.copy_(function(*inputs))

    return kernel


def pack_bits(x: Tensor, out: Tensor) -> None:
    out.copy_(reference.pack_bits(x.movedim(1, -1)))


def unpack_bits(packed: Tensor, out: Tensor) -> None:
    out.copy_(reference.unpack_bits(packed, out.shape[1], out.dtype).movedim(-1, 1))


def random_bits(num_bits: int, seed: int, sample_offset: int, seed_tensor: Tensor | None, out: Tensor) -> None:
    batch, rows, _ = out.shape
    out.copy_(reference.random_bits(batch, rows, num_bits, _scalar(seed, seed_tensor, out), sample_offset))


def flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    temperature: float,
    x0_prediction: bool,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    guidance_tensor: Tensor | None,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
    nonfinite: Tensor | None,
    out: Tensor,
) -> None:
    x_s, count = reference.flip_step(
        logits,
        x_t,
        coefficients,
        _scalar(seed, seed_tensor, out),
        _scalar(step, step_tensor, out),
        sample_offset if offset_tensor is None else offset_tensor,
        temperature,
        x0_prediction,
        uncond_logits,
        torch.tensor(guidance_scale, device=out.device, dtype=torch.float64) if guidance_tensor is None else guidance_tensor,
        keep_mask,
        keep_bits,
    )
    out.copy_(x_s)
    if nonfinite is not None:
        nonfinite += count


def add_noise(
    x_0: Tensor,
    flip_probability: Tensor,
    num_bits: int,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    draw = (_scalar(seed, seed_tensor, out), _scalar(step, step_tensor, out), sample_offset)
    out.copy_(reference.add_noise(x_0, flip_probability, num_bits, *draw))


def binarize(
    logits: Tensor,
    bernoulli: bool,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    rows = logits.movedim(2, -1).flatten(1, 2)
    draw = (_scalar(seed, seed_tensor, out), _scalar(step, step_tensor, out), sample_offset)
    out.copy_(reference.pack_bits(reference.binarize(rows, bernoulli, *draw)))


def flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    x0_prediction: bool,
    factor: float,
    out: Tensor,
    set_fraction: Tensor | None,
) -> None:
    options = (focal_gamma, set_fraction is not None, x0_prediction, factor, out.dim() == 0)
    loss, fraction = reference.flip_loss(logits, x_0, x_t, weight, *options)
    out.copy_(loss)
    if set_fraction is not None and fraction is not None:
        set_fraction.copy_(fraction)


def hamming_topk(queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
    nearest = reference.hamming_topk(queries, database, k)
    distances.copy_(nearest[0])
    indices.copy_(nearest[1])


def load() -> Backend:
    kernels: dict[str, Callable[..., None]] = {
        name: _copying(getattr(reference, name))
        for name in (
            "flip_probability",
            "flip_probability_backward",
            "flip_loss_backward",
            "embed_bits",
            "embed_bits_backward",
            "hamming_distance",
        )
    }
    for kernel in (pack_bits, unpack_bits, random_bits, flip_step, add_noise, binarize, flip_loss, hamming_topk):
        kernels[kernel.__name__] = kernel
    details = f"the reference in PyTorch {torch.__version__}, every device, float64 too"
    return Backend("torch", ("cpu", "cuda"), None, kernels, details, float64=True)
