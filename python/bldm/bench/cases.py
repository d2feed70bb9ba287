"""What is measured: op, size, how the inputs are made, what must come out, and the fewest bytes the packed op must move.

A latent of the paper's model is 256 positions of 64 bits, so 64 of them are 1 M bits and 16,384 are 268 M. The bytes of a row are
those of the packed op whatever the provider (each input read once, each output written once): fractions compare across providers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from . import plain
from .checks import Check, by_samples, close, exact, nearest, rate

SIZES = ("small", "large", "all")
SCHEDULE = bk.BernoulliSchedule("linear", 256)
TIMESTEPS = SCHEDULE.timesteps(16)
STEP = 8
KEPT = float(SCHEDULE.keep[TIMESTEPS[STEP + 1]])
KAPPA = float(SCHEDULE.keep[TIMESTEPS[STEP]]) / KEPT
NOISE = 0.2
SEED = 3
NEIGHBOURS = 10
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Opponent:
    """The op in plain PyTorch: `function` is what torch.compile compiles, `call` calls it (or its compiled form)."""

    function: Callable[..., Any]
    call: Callable[[Callable[..., Any]], Any]
    check: Check


@dataclass(frozen=True)
class Problem:
    """One op on one set of inputs. `outputs` are written by `run` and poisoned before it is checked.

    bits, bytes: the size of the problem and the fewest bytes it must move. share: the part of it that the opponents work on,
    where all of it would not fit; they are compared by time a bit.
    """

    run: Callable[[], Any]
    check: Check
    bits: int
    bytes: int
    eager: Opponent
    matmul: Opponent | None = None
    outputs: tuple[Tensor, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    """One row a provider. in_graph: the time of one call among 20 in a CUDA graph."""

    op: str
    config: str
    make: Callable[[torch.device], Problem]
    in_graph: bool = False


def _random(*shape: int, device: torch.device) -> Tensor:
    """Fresh packed bits, without a kernel of this package."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _packed(shape: Shape, device: torch.device) -> Tensor:
    return _random(shape[0], shape[1], shape[2] // 8, device=device)


def _config(shape: tuple[int, ...], *words: object) -> str:
    return " ".join(["x".join(map(str, shape)), *(str(word).removeprefix("torch.") for word in words)])


def _graph(in_graph: bool) -> tuple[str, ...]:
    return ("in a graph",) if in_graph else ()


def _tolerance(dtype: torch.dtype) -> float:
    """Of a relative error: rounding to the dtype, with room for another order of summation."""
    return {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


# --- packed bits -----------------------------------------------------------------------------------------------------
def pack_bits(shape: Shape, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Problem:
        packed = _packed(shape, device)
        bits, out = plain.unpack(packed, dtype), torch.empty_like(packed)
        check = exact(packed)
        eager = Opponent(plain.pack, lambda f: f(bits), check)
        size = bits.numel()
        run = lambda: bk.pack_bits(bits, out=out)  # noqa: E731
        return Problem(run, check, size, size * bits.element_size() + size // 8, eager, outputs=(out,))

    return Case("pack_bits", _config(shape, dtype), make)


def unpack_bits(shape: Shape, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Problem:
        packed = _packed(shape, device)
        bits = plain.unpack(packed, dtype)
        out = torch.empty_like(bits)
        check = exact(bits)
        eager = Opponent(plain.unpack, lambda f: f(packed, dtype), check)
        size = bits.numel()
        run = lambda: bk.unpack_bits(packed, shape[-1], dtype, out=out)  # noqa: E731
        return Problem(run, check, size, size * bits.element_size() + size // 8, eager, outputs=(out,))

    return Case("unpack_bits", _config(shape, dtype), make)


def random_bits(shape: Shape) -> Case:
    def make(device: torch.device) -> Problem:
        out = torch.empty_like(_packed(shape, device))

        def reference(part: slice) -> Tensor:
            count = part.stop - part.start
            return bk.random_bits(count, shape[1:], seed=SEED, sample_offset=part.start, device=device)

        half = lambda part: torch.full_like(out[part], 0.5, dtype=torch.float64).repeat(1, 1, 8)  # noqa: E731
        fair = rate(lambda bits: bits, half, shape[0])
        eager = Opponent(plain.random_bits, lambda f: f(shape, device), fair)
        run = lambda: bk.random_bits(shape[0], shape[1:], seed=SEED, out=out)  # noqa: E731
        check = exact(by_samples(reference, shape[0], shape[1] * shape[2]))
        return Problem(run, check, out.numel() * 8, out.numel(), eager, outputs=(out,))

    return Case("random_bits", _config(shape), make)


def binarize(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Bernoulli bits of (B, C, H, W) logits; the opponent leaves them as floats in that layout."""

    def make(device: torch.device) -> Problem:
        batch, channels, height, width = shape
        logits = torch.randn(shape, device=device, dtype=dtype)
        out = _random(batch, height, width, channels // 8, device=device)

        def reference(part: slice) -> Tensor:
            return bk.binarize(logits[part], seed=SEED, sample_offset=part.start, dim=1)

        fair = rate(lambda bits: bits, lambda part: torch.sigmoid(logits[part].double()), batch)
        eager = Opponent(plain.binarize, lambda f: f(logits), fair)
        run = lambda: bk.binarize(logits, seed=SEED, dim=1, out=out)  # noqa: E731
        size = logits.numel()
        check = exact(by_samples(reference, batch, size // batch))
        return Problem(run, check, size, size * logits.element_size() + size // 8, eager, outputs=(out,))

    return Case("binarize", _config(shape, dtype), make)


# --- the Bernoulli diffusion -----------------------------------------------------------------------------------------
def flip_step(shape: Shape, dtype: torch.dtype, in_graph: bool = False) -> Case:
    def make(device: torch.device) -> Problem:
        logits, x_t = torch.randn(shape, device=device, dtype=dtype), _packed(shape, device)
        bits, out = plain.unpack(x_t, torch.float32), torch.empty_like(x_t)
        coefficients = SCHEDULE.coefficients(TIMESTEPS)[STEP].to(device)
        nonfinite = torch.zeros(1, dtype=torch.int32, device=device)

        def step(part: slice, **options: Any) -> Tensor:
            draw = {"seed": SEED, "step": STEP, "sample_offset": part.start, "nonfinite": nonfinite}
            return bk.flip_step(logits[part], x_t[part], coefficients, **draw, **options)

        def probability(part: slice) -> Tensor:
            return plain.step_probability(logits[part], bits[part], KEPT, KAPPA)

        flips = rate(lambda x_s: x_s != bits, probability, shape[0])
        eager = Opponent(plain.step, lambda f: f(logits, bits, KEPT, KAPPA), flips)
        run = lambda: step(slice(0, shape[0]), out=out)  # noqa: E731
        size = logits.numel()
        check = exact(by_samples(step, shape[0], size // shape[0]))
        return Problem(run, check, size, size * logits.element_size() + size // 4, eager, outputs=(out,))

    return Case("flip_step", _config(shape, dtype, *_graph(in_graph)), make, in_graph)


def flip_probability(shape: Shape, dtype: torch.dtype, in_graph: bool = False) -> Case:
    """Forward and backward: the gradient of a weighted sum of the probabilities."""

    def make(device: torch.device) -> Problem:
        logits = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        grad, x_t = torch.randn(shape, device=device), _packed(shape, device)
        bits = plain.unpack(x_t, torch.float32)
        coefficients = SCHEDULE.coefficients(TIMESTEPS)[STEP].to(device)

        def gradient(leaf: Tensor) -> Tensor:
            p = bk.flip_probability(leaf, x_t, coefficients)
            return torch.autograd.grad(p, leaf, grad.to(p.dtype))[0]

        def unpacked(f: Callable[..., Tensor]) -> Tensor:
            return torch.autograd.grad(f(logits, bits, KEPT, KAPPA), logits, grad)[0]

        with bk.use_backend("torch"):
            check = close(gradient(logits.detach().double().requires_grad_()), _tolerance(dtype))
        size = logits.numel()
        total = size * (3 * logits.element_size() + 2 * grad.element_size()) + size // 4
        return Problem(lambda: gradient(logits), check, size, total, Opponent(plain.flip_probability, unpacked, check))

    return Case("flip_probability", _config(shape, dtype, "forward + backward", *_graph(in_graph)), make, in_graph)


def add_noise(shape: Shape) -> Case:
    def make(device: torch.device) -> Problem:
        x_0 = _packed(shape, device)
        bits, out = plain.unpack(x_0, torch.float32), torch.empty_like(x_0)
        p = torch.full((1,), NOISE, device=device)

        def noisy(part: slice, **options: Any) -> Tensor:
            return bk.add_noise(x_0[part], p, seed=SEED, sample_offset=part.start, **options)

        constant = lambda part: torch.full_like(bits[part], NOISE, dtype=torch.float64)  # noqa: E731
        flips = rate(lambda x_t: x_t != bits, constant, shape[0])
        eager = Opponent(plain.add_noise, lambda f: f(bits, 1 - 2 * NOISE), flips)
        run = lambda: noisy(slice(0, shape[0]), out=out)  # noqa: E731
        check = exact(by_samples(noisy, shape[0], shape[1] * shape[2]))
        return Problem(run, check, bits.numel(), 2 * x_0.numel(), eager, outputs=(out,))

    return Case("add_noise", _config(shape), make)


def flip_loss(shape: Shape, dtype: torch.dtype, balanced: bool = False, in_graph: bool = False) -> Case:
    """Forward and backward of the mean loss."""

    def make(device: torch.device) -> Problem:
        logits = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        x_0, x_t = _packed(shape, device), _packed(shape, device)
        bits = [plain.unpack(x, torch.float32) for x in (x_0, x_t)]

        def gradient(leaf: Tensor) -> Tensor:
            return torch.autograd.grad(bk.flip_loss(leaf, x_0, x_t, balanced=balanced), leaf)[0]

        def unpacked(f: Callable[..., Tensor]) -> Tensor:
            return torch.autograd.grad(f(logits, *bits), logits)[0]

        with bk.use_backend("torch"):
            check = close(gradient(logits.detach().double().requires_grad_()), _tolerance(dtype))
        eager = Opponent(plain.balanced_flip_loss if balanced else plain.flip_loss, unpacked, check)
        size = logits.numel()
        total = 3 * size * logits.element_size() + size // 2
        return Problem(lambda: gradient(logits), check, size, total, eager)

    words = ("balanced", "forward + backward") if balanced else ("forward + backward",)
    return Case("flip_loss", _config(shape, dtype, *words, *_graph(in_graph)), make, in_graph)


# --- products with bits, distances -----------------------------------------------------------------------------------
def embed_bits(shape: Shape, features: int, dtype: torch.dtype) -> Case:
    """Eager unpacks and multiplies; `matmul` has its bits unpacked already, as -1 and 1 in the dtype of the weight."""

    def make(device: torch.device) -> Problem:
        packed = _packed(shape, device)
        weight = torch.randn(shape[-1], features, device=device, dtype=dtype)
        signs = 2 * plain.unpack(packed, dtype) - 1
        out = torch.empty(*shape[:-1], features, device=device, dtype=dtype)
        check = close(signs.double() @ weight.double(), _tolerance(dtype))
        run = lambda: bk.embed_bits(packed, weight, out=out)  # noqa: E731
        total = packed.numel() + (weight.numel() + out.numel()) * weight.element_size()
        eager = Opponent(plain.embed, lambda f: f(packed, weight), check)
        matmul = Opponent(plain.embed_unpacked, lambda f: f(signs, weight), check)
        return Problem(run, check, signs.numel(), total, eager, matmul, outputs=(out,))

    return Case("embed_bits", _config(shape, f"-> {features}", dtype), make)


def hamming_distance(shape: Shape) -> Case:
    def make(device: torch.device) -> Problem:
        a, b = _packed(shape, device), _packed(shape, device)
        bits = [plain.unpack(x, torch.uint8) for x in (a, b)]
        expected = by_samples(lambda part: bk.hamming_distance(a[part], b[part]), shape[0], shape[1] * shape[2])
        check = exact(expected)
        eager = Opponent(plain.hamming_distance, lambda f: f(*bits), check)
        total = 2 * a.numel() + 4 * shape[0]
        return Problem(lambda: bk.hamming_distance(a, b), check, a.numel() * 8, total, eager)

    return Case("hamming_distance", _config(shape), make)


def hamming_topk(queries: int, database: int, plain_database: int, sample_bytes: int = 2048) -> Case:
    """Latents of 2 KiB; the opponents search the first `plain_database` of them, unpacked: PyTorch's own ways to do it.

    "eager" (and torch.compile of it): bits as uint8, an exclusive or and a sum for each query in turn. "matmul": one product of
    bits kept as -1 and 1 in bfloat16 (float32 on a CPU), which takes 16 times the memory and is by far the faster of the two.
    """

    def make(device: torch.device) -> Problem:
        q, d = _random(queries, sample_bytes, device=device), _random(database, sample_bytes, device=device)
        q_bits, d_bits = plain.unpack(q, torch.uint8), plain.unpack(d[:plain_database], torch.uint8)
        signs_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q_signs, d_signs = (2 * x.to(signs_dtype) - 1 for x in (q_bits, d_bits))

        def one_by_one(f: Callable[..., Tensor]) -> Tensor:
            return torch.stack([f(query, d_bits, NEIGHBOURS) for query in q_bits])

        check = exact(plain.hamming_nearest_matmul(q_signs, d_signs, NEIGHBOURS).long())
        some = exact(torch.stack([plain.hamming_nearest(query, d_bits, NEIGHBOURS) for query in q_bits[:4]]))
        eager = Opponent(plain.hamming_nearest, one_by_one, check)
        product = Opponent(
            plain.hamming_nearest_matmul, lambda f: f(q_signs, d_signs, NEIGHBOURS), lambda out: some(out[:4].long())
        )
        return Problem(
            lambda: bk.hamming_topk(q, d, NEIGHBOURS),
            nearest(q, d, NEIGHBOURS),
            queries * database * sample_bytes * 8,
            (queries + database) * sample_bytes + queries * NEIGHBOURS * 12,
            eager,
            product,
            share=plain_database / database,
        )

    return Case("hamming_topk", f"{queries} of {database:,} x {sample_bytes} bytes", make)


# --- the table -------------------------------------------------------------------------------------------------------
SMALL, MIDDLE, LARGE = (64, 256, 64), (1024, 256, 64), (16384, 256, 64)


def _training_in_graph(shape: Shape, dtype: torch.dtype) -> list[Case]:
    """Forward and backward without what Python takes to call them, which decides the time of small ones."""
    return [
        flip_probability(shape, dtype, in_graph=True),
        flip_loss(shape, dtype, in_graph=True),
        flip_loss(shape, dtype, balanced=True, in_graph=True),
    ]


def _small(dtype: torch.dtype, gpu: bool) -> list[Case]:
    graph = [flip_step(SMALL, dtype, in_graph=True), *_training_in_graph(SMALL, dtype)] if gpu else []
    return [
        pack_bits(SMALL, torch.float32),
        unpack_bits(SMALL, torch.float32),
        random_bits(SMALL),
        binarize((64, 64, 16, 16), dtype),
        flip_step(SMALL, dtype),
        flip_probability(SMALL, dtype),
        add_noise(SMALL),
        flip_loss(SMALL, dtype),
        flip_loss(SMALL, dtype, balanced=True),
        *graph,
        embed_bits(SMALL, 768 if gpu else 256, dtype),
        hamming_distance(SMALL),
        hamming_topk(1, 4096, 1024),
    ]


def _large(dtype: torch.dtype, gpu: bool) -> list[Case]:
    return [
        *(pack_bits(LARGE, bits) for bits in (torch.float32, torch.bfloat16, torch.uint8)),
        *(unpack_bits(LARGE, bits) for bits in (torch.float32, torch.bfloat16, torch.uint8)),
        random_bits(LARGE),
        binarize((16384, 64, 16, 16), dtype),
        flip_step(MIDDLE, dtype),
        flip_step(LARGE, dtype),
        flip_probability(MIDDLE, dtype),
        add_noise(MIDDLE),
        add_noise(LARGE),
        flip_loss(MIDDLE, dtype),
        flip_loss(MIDDLE, dtype, balanced=True),
        *(_training_in_graph(MIDDLE, dtype) if gpu else ()),
        embed_bits(MIDDLE, 768, dtype),
        hamming_distance(LARGE),
        hamming_topk(1, 1_280_000, 131_072),
        hamming_topk(1000, 1_280_000, 16_384),
    ]


def cases(size: str, device: torch.device) -> list[Case]:
    """The cases of a size ("small", "large" or "all"), with bfloat16 logits on a GPU and float32 on a CPU."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    return (_small(dtype, gpu) if size != "large" else []) + (_large(dtype, gpu) if size != "small" else [])


OPS = tuple(dict.fromkeys(case.op for case in cases("all", torch.device("cpu"))))
