"""Backend `cuda`: CUDA kernels of the extension `bldm_kernels._native`, launched on PyTorch's current stream."""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import Backend
from .cpu import FLOAT_TYPES, ONES
from .native import load_part
from .search import Kernels, search

# Up to here a key for every pair and torch.topk take less time than the search.
FEW_QUERIES = 4


def _launch_on(x: Tensor) -> tuple[int, int]:
    """(device index, address of PyTorch's current stream there), the last two arguments of every launch."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)  # what torch.cuda.current_stream wraps, at a tenth of the time


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _samples(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[0]


def _scale(temperature: float) -> float:
    return -math.log2(math.e) / temperature


def _scratch(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _kernels(native: ModuleType) -> dict[str, Callable[..., None]]:
    """The canonical kernels (see `_ops.py`) in terms of addresses and sizes."""

    def pack_bits(x: Tensor, out: Tensor) -> None:
        item = (x.element_size(), x.dtype.is_floating_point)
        native.pack_bits(x.data_ptr(), *item, *x.shape, out.data_ptr(), *_launch_on(out))

    def unpack_bits(packed: Tensor, out: Tensor) -> None:
        item = (out.element_size(), ONES.get(out.dtype, 1))
        native.unpack_bits(packed.data_ptr(), *out.shape, *item, out.data_ptr(), *_launch_on(out))

    def random_bits(num_bits: int, seed: int, sample_offset: int, seed_tensor: Tensor | None, out: Tensor) -> None:
        draw = (seed, _address(seed_tensor), sample_offset)
        native.random_bits(out.data_ptr(), out.shape[0], out.shape[1], num_bits, *draw, *_launch_on(out))

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
            seed,
            _address(seed_tensor),
            step,
            _address(step_tensor),
            sample_offset,
            _address(offset_tensor),
            _scale(temperature),
            x0_prediction,
            _address(uncond_logits),
            guidance_scale,
            _address(guidance_tensor),
            _address(keep_mask),
            _samples(keep_mask),
            _address(keep_bits),
            _samples(keep_bits),
            _address(nonfinite),
            out.data_ptr(),
            *_launch_on(out),
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
        draw = (seed, _address(seed_tensor), step, _address(step_tensor), sample_offset)
        native.add_noise(x_0.data_ptr(), *shape, *probability, *draw, out.data_ptr(), *_launch_on(out))

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
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], *logits.shape)
        draw = (seed, _address(seed_tensor), step, _address(step_tensor), sample_offset)
        native.binarize(*values, bernoulli, *draw, out.data_ptr(), *_launch_on(out))

    def flip_probability(
        logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool, out: Tensor
    ) -> None:
        values = (logits.data_ptr(), FLOAT_TYPES[logits.dtype], x_t.data_ptr(), *logits.shape)
        table = (coefficients.data_ptr(), coefficients.shape[0])
        native.flip_probability(*values, *table, _scale(temperature), x0_prediction, out.data_ptr(), *_launch_on(out))

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
        native.flip_probability_backward(grad.data_ptr(), *values, *options, out.data_ptr(), *_launch_on(out))

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
        scratch = _scratch(native.flip_loss_scratch(*logits.shape), out)
        results = (scratch.data_ptr(), out.data_ptr(), _address(set_fraction))
        native.flip_loss(*values, *options, *results, *_launch_on(out))

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
        native.flip_loss_backward(grad.data_ptr(), grad.numel(), *values, *options, out.data_ptr(), *_launch_on(out))

    def embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool, out: Tensor) -> None:
        values = (packed.data_ptr(), weight.data_ptr(), FLOAT_TYPES[weight.dtype], _address(bias))
        native.embed_bits(*values, packed.shape[0], *weight.shape, signed, out.data_ptr(), *_launch_on(out))

    def embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool, out: Tensor) -> None:
        values = (grad.data_ptr(), FLOAT_TYPES[grad.dtype], packed.data_ptr())
        sizes = (packed.shape[0], *out.shape)
        scratch = _scratch(native.embed_bits_backward_scratch(*sizes), out)
        native.embed_bits_backward(*values, *sizes, signed, scratch.data_ptr(), out.data_ptr(), *_launch_on(out))

    def hamming_distance(a: Tensor, b: Tensor, out: Tensor) -> None:
        native.hamming_distance(a.data_ptr(), b.data_ptr(), a.shape[0], b.shape[0], a.shape[1], out.data_ptr(), *_launch_on(a))

    def count_bits(rows: Tensor, out: Tensor) -> None:
        hamming_distance(rows, rows.new_zeros(1, rows.shape[1]), out)

    def candidates(
        queries: Tensor,
        rows: Tensor,
        query_bits: Tensor,
        first_row: int,
        keys: Tensor,
        counts: Tensor,
        limits: Tensor,
    ) -> None:
        values = (queries.data_ptr(), rows.data_ptr(), query_bits.data_ptr(), len(queries), *rows.shape)
        kept = (keys.data_ptr(), keys.shape[1], counts.data_ptr(), limits.data_ptr())
        native.hamming_candidates(*values, first_row, *kept, *_launch_on(keys))

    def select(keys: Tensor, k: int, max_distance: int, counts: Tensor, limits: Tensor) -> None:
        sizes = (*keys.shape, k, max_distance)
        native.hamming_select(keys.data_ptr(), *sizes, counts.data_ptr(), limits.data_ptr(), *_launch_on(keys))

    def hamming_topk(queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
        if len(queries) > FEW_QUERIES:
            return search(Kernels(count_bits, candidates, select), queries, database, k, distances, indices)
        keys = torch.empty(len(queries), len(database), dtype=torch.int64, device=queries.device)
        values = (queries.data_ptr(), database.data_ptr(), len(queries), *database.shape)
        native.hamming_keys(*values, keys.data_ptr(), *_launch_on(keys))
        nearest = keys.topk(k, largest=False, sorted=True).values
        distances.copy_(nearest >> 32)
        indices.copy_(nearest & 0xFFFFFFFF)

    helpers = ("native", "count_bits", "candidates", "select")
    return {name: kernel for name, kernel in locals().items() if name not in (*helpers, "helpers")}


def _has_code(archs: list[str], capability: int) -> bool:
    """Machine code runs on its own major version from its minor one up; the last architecture is there as PTX too, which newer
    GPUs compile when they load it. An architecture like 90a runs on that GPU only."""
    numbers = [int(arch.rstrip("af")) for arch in archs]
    exact = any(n == capability for n in numbers)
    plain = [n for arch, n in zip(archs, numbers, strict=True) if arch.isdigit()]
    same_major = any(n // 10 == capability // 10 and n <= capability for n in plain)
    return exact or same_major or (archs[-1].isdigit() and numbers[-1] <= capability)


def _missing(native: ModuleType, archs: list[str]) -> str | None:
    """Why the kernels cannot run on the GPUs of this machine, or None."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if not torch.cuda.is_available():
        return "no GPU visible"
    for device in range(torch.cuda.device_count()):
        try:
            capability = native.compute_capability(device)
        except RuntimeError as error:
            return f"the driver does not run this build: {error}"
        if not _has_code(archs, capability):
            built = ", ".join(f"sm_{arch}" for arch in archs)
            return f"built for {built}, but cuda:{device} is sm_{capability} (rebuild with BLDM_CUDA_ARCHS={capability})"
    return None


def load() -> Backend:
    native, reason, info = load_part("cuda")
    if native is None:
        return Backend("cuda", ("cuda",), reason)
    archs = info["cuda_archs"].split(";")
    details = f"CUDA for {', '.join(f'sm_{arch}' for arch in archs)}"
    return Backend("cuda", ("cuda",), _missing(native, archs), _kernels(native), details)
