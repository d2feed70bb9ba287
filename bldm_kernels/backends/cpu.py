"""Backend `cpu`: C++ kernels of the extension `bldm_kernels._native`, OpenMP threads as PyTorch has them."""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import Backend
from .native import load_part

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The bit pattern of 1 in a dtype that has more than whole numbers.
ONES = {torch.float32: 0x3F800000, torch.float64: 0x3FF0000000000000, torch.float16: 0x3C00, torch.bfloat16: 0x3F80}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _samples(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[0]


def _value(value: int, tensor: Tensor | None) -> int:
    return value if tensor is None else int(tensor)


def _scale(temperature: float) -> float:
    return -math.log2(math.e) / temperature


def _kernels(native: ModuleType) -> dict[str, Callable[..., None]]:
    """The canonical kernels (see `_ops.py`) in terms of addresses and sizes."""
    threads = torch.get_num_threads

    def pack_bits(x: Tensor, out: Tensor) -> None:
        is_float = x.dtype.is_floating_point
        native.pack_bits(x.data_ptr(), x.element_size(), is_float, *x.shape, out.data_ptr(), threads())

    def unpack_bits(packed: Tensor, out: Tensor) -> None:
        item = (out.element_size(), ONES.get(out.dtype, 1))
        native.unpack_bits(packed.data_ptr(), *out.shape, *item, out.data_ptr(), threads())

    def random_bits(num_bits: int, seed: int, sample_offset: int, seed_tensor: Tensor | None, out: Tensor) -> None:
        draw = (_value(seed, seed_tensor), sample_offset)
        native.random_bits(out.data_ptr(), out.shape[0], out.shape[1], num_bits, *draw, threads())

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
        native.flip_step(
            logits.data_ptr(),
            FLOAT_TYPES[logits.dtype],
            x_t.data_ptr(),
            *logits.shape,
            coefficients.data_ptr(),
            coefficients.shape[0],
            _value(seed, seed_tensor),
            _value(step, step_tensor),
            _value(sample_offset, offset_tensor),
            _scale(temperature),
            x0_prediction,
            _address(uncond_logits),
            guidance_scale if guidance_tensor is None else float(guidance_tensor),
            _address(keep_mask),
            _samples(keep_mask),
            _address(keep_bits),
            _samples(keep_bits),
            _address(nonfinite),
            out.data_ptr(),
            threads(),
        )

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
        shape = (x_0.shape[0], x_0.shape[1], num_bits)
        probability = (flip_probability.data_ptr(), flip_probability.numel())
        draw = (_value(seed, seed_tensor), _value(step, step_tensor), sample_offset)
        native.add_noise(x_0.data_ptr(), *shape, *probability, *draw, out.data_ptr(), threads())

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
        draw = (_value(seed, seed_tensor), _value(step, step_tensor), sample_offset)
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype])
        native.binarize(*values, *logits.shape, bernoulli, *draw, out.data_ptr(), threads())

    def flip_probability(
        logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool, out: Tensor
    ) -> None:
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], x_t.data_ptr(), *logits.shape)
        table = (coefficients.data_ptr(), coefficients.shape[0])
        native.flip_probability(*values, *table, _scale(temperature), x0_prediction, out.data_ptr(), threads())

    def flip_probability_backward(
        grad: Tensor,
        logits: Tensor,
        x_t: Tensor,
        coefficients: Tensor,
        temperature: float,
        x0_prediction: bool,
        out: Tensor,
    ) -> None:
        grad = grad.float()
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], x_t.data_ptr(), *logits.shape)
        options = (coefficients.data_ptr(), coefficients.shape[0], _scale(temperature), temperature, x0_prediction)
        native.flip_probability_backward(grad.data_ptr(), *values, *options, out.data_ptr(), threads())

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
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], x_0.data_ptr(), x_t.data_ptr(), *logits.shape)
        options = (_address(weight), focal_gamma, x0_prediction, factor, out.dim() == 0)
        results = (out.data_ptr(), _address(set_fraction))
        native.flip_loss(*values, *options, *results, threads())

    def flip_loss_backward(
        grad: Tensor,
        logits: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        weight: Tensor | None,
        set_fraction: Tensor | None,
        focal_gamma: float,
        x0_prediction: bool,
        factor: float,
        out: Tensor,
    ) -> None:
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], x_0.data_ptr(), x_t.data_ptr(), *logits.shape)
        options = (_address(weight), _address(set_fraction), focal_gamma, x0_prediction, factor)
        native.flip_loss_backward(grad.data_ptr(), grad.numel(), *values, *options, out.data_ptr(), threads())

    def embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool, out: Tensor) -> None:
        values = (packed.data_ptr(), weight.data_ptr(), FLOAT_TYPES[weight.dtype], _address(bias))
        native.embed_bits(*values, packed.shape[0], *weight.shape, signed, out.data_ptr(), threads())

    def embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool, out: Tensor) -> None:
        values = (grad.data_ptr(), FLOAT_TYPES[grad.dtype], packed.data_ptr())
        native.embed_bits_backward(*values, *packed.shape[:1], *out.shape, signed, out.data_ptr(), threads())

    def hamming_distance(a: Tensor, b: Tensor, out: Tensor) -> None:
        native.hamming_distance(a.data_ptr(), b.data_ptr(), a.shape[0], b.shape[0], a.shape[1], out.data_ptr(), threads())

    def hamming_topk(queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
        sizes = (queries.shape[0], *database.shape, k)
        results = (distances.data_ptr(), indices.data_ptr())
        native.hamming_topk(queries.data_ptr(), database.data_ptr(), *sizes, *results, threads())

    return {name: kernel for name, kernel in locals().items() if name not in ("native", "threads")}


def load() -> Backend:
    native, reason, info = load_part("cpu")
    if native is None:
        return Backend("cpu", ("cpu",), reason)
    others = [isa for isa in native.supported_isas if isa != native.isa]
    details = f"C++ for {native.isa} (also here: {', '.join(others) or 'none'}), built by {info['compiler']}"
    return Backend("cpu", ("cpu",), None, _kernels(native), details)
