"""Operators of a training step: values and gradients against float64. Where there is no GPU, Triton's kernels are interpreted."""

from collections.abc import Callable

import pytest
import torch
from bldm.denoiser import BinaryDenoiser, Block
from bldm.training.learner import fuse
from conftest import require_gpu
from targets import HAS_GPU
from torch import Tensor
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference.attention import takes_whole_heads
from bldm_kernels.training.attention import attention, fits
from bldm_kernels.training.gelu import bias_gelu
from bldm_kernels.training.norm import add_norm

DEVICE = "cuda" if HAS_GPU else "cpu"


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> list[Tensor]:
    """Of variance one; matrices of such that products are, too."""
    torch.manual_seed(0)
    made = [torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """The values, and the gradients by all tensors."""
    found = function(*tensors)
    values = found if isinstance(found, tuple) else (found,)
    torch.manual_seed(1)
    weights = [torch.randn(value.shape).to(value.device, torch.bfloat16).to(value.dtype) for value in values]
    return [*(value.detach() for value in values), *torch.autograd.grad(values, tensors, weights)]


def check(function: Function, usual: Function, tensors: list[Tensor], limit: float) -> None:
    expected = results(usual, [x.detach().double().requires_grad_() for x in tensors])
    for got, wanted in zip(results(function, tensors), expected, strict=True):
        assert got.dtype == tensors[0].dtype and got.shape == wanted.shape
        assert float((got.double() - wanted).norm() / wanted.norm()) < limit


def usual_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def usual_attention(num_heads: int) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return function


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 17, 300), (2, 40, 256)] + [(64, 257, 3072)] * HAS_GPU, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gelu(shape: tuple[int, ...], backend: str) -> None:
    with bk.use_backend(backend):
        check(bias_gelu, usual_gelu, random(shape, shape[-1:]), 6e-3)


def test_gelu_of_any_size() -> None:
    """In the tails too, and where nothing comes through."""
    x = torch.tensor([-200.0, -9, -5, -3, -0.0, 0, 1e-3, 3, 9, 200], device=DEVICE).bfloat16()
    with bk.use_backend("triton"):
        value, gradient, _ = results(bias_gelu, [x.requires_grad_(), torch.zeros_like(x, requires_grad=True)])
    wanted = F.gelu(x.detach().double())
    assert (value.double() - wanted).abs().le(4e-3 * wanted.abs() + 1e-6).all() and gradient.isfinite().all()


@pytest.mark.parametrize("shape, num_heads", [((2, 5, 24), 3), ((1, 257, 128), 2), ((3, 33, 64), 1)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention(shape: tuple[int, ...], num_heads: int, backend: str) -> None:
    width = shape[-1]
    with bk.use_backend(backend):
        check(
            lambda *x: attention(*x, num_heads),
            usual_attention(num_heads),
            random(shape, (3 * width, width), (3 * width,)),
            1.5e-2,
        )


def usual_add_norm(x: Tensor, h: Tensor, weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = x + h if bias is None else x + h + bias
    return total, F.layer_norm(total, weight.shape, weight, shift, 1e-5)


def add_norm_of(x: Tensor, h: Tensor, weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return add_norm(x, h, bias, weight, shift)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 17, 300), (2, 40, 256), (2, 7, 3000)] + [(64, 257, 768)] * HAS_GPU, ids=str)
@pytest.mark.parametrize("vectors", [2, 3])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_add_norm(shape: tuple[int, ...], vectors: int, backend: str) -> None:
    tensors = random(shape, shape, *[shape[-1:]] * vectors)
    with bk.use_backend(backend):
        check(add_norm_of, usual_add_norm, tensors, 6e-3)
        check(lambda *x: add_norm_of(*x)[1], lambda *x: usual_add_norm(*x)[1], tensors, 6e-3)


def test_add_norm_of_which_the_sum_alone_is_asked_for() -> None:
    x, h, bias, weight = random((2, 3, 8), (2, 3, 8), (8,), (8,), dtype=torch.float32)
    total, normal = add_norm(x, h, bias, weight, weight)
    by_x, by_h, by_bias = torch.autograd.grad(total.sum(), (x, h, bias))
    assert torch.equal(by_x, torch.ones_like(x)) and torch.equal(by_h, by_x) and torch.equal(by_bias, torch.full_like(bias, 6))


@pytest.mark.parametrize("far", [300.0, -40000.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_add_norm_of_rows_far_from_zero(far: float, backend: str) -> None:
    """The deviation is found from what is left without the mean."""
    x, h, weight, shift = random((5, 64), (5, 64), (64,), (64,))
    rows = (x.detach().float() + far).bfloat16()
    with bk.use_backend(backend):
        got = add_norm(rows, torch.zeros_like(h), None, weight, shift)[1].detach()
    wanted = F.layer_norm(rows.double(), (64,), weight.detach().double(), shift.detach().double(), 1e-5)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 6e-3


def test_in_float64() -> None:
    vectors = random((2, 3, 5), (2, 3, 5), (5,), (5,), (5,), dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(add_norm_of, vectors)
    assert torch.autograd.gradcheck(bias_gelu, random((2, 3, 5), (5,), dtype=torch.float64, device="cpu"))
    tensors = random((2, 4, 6), (18, 6), (18,), dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(lambda *x: attention(*x, 2), tensors)


@pytest.mark.parametrize("samples, tokens", [(2, 257), (64, 257), (8, 256), (5, 260)])
def test_attention_by_kernels(samples: int, tokens: int) -> None:
    require_gpu()
    tensors = random((samples, tokens, 768), (2304, 768), (2304,))
    if not takes_whole_heads(torch.empty(samples, tokens, 2304, dtype=torch.bfloat16, device="cuda"), 12):
        pytest.skip("the kernel is for compute capability 9.0")
    assert fits(tokens, 768, 12)
    check(lambda *x: attention(*x, 12), usual_attention(12), tensors, 1.5e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("text_width", [None, 8])
@pytest.mark.parametrize("first", [False, True])
def test_a_fused_block_is_the_block(compiled: bool, text_width: int | None, first: bool) -> None:
    """257 tokens for the operator of attention; values and gradients of all parameters, and of what comes in."""
    if compiled and text_width:
        pytest.skip("compiled as without text")
    torch.manual_seed(0)
    block = Block(64, 1, 4, 0.0, text_width).to(DEVICE, torch.bfloat16)
    x, h, bias, text = random((2, 257, 64), (2, 257, 64), (64,), (2, 3, 8))
    inputs = [x] if first else [x, h, bias]

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        branch = None if first else (h.to(dtype), bias.to(dtype))
        stream, (added, missing) = block(x.to(dtype), branch, None, text.detach().to(dtype))
        result = stream + (added if missing is None else added + missing)
        torch.manual_seed(1)
        weight = torch.randn(result.shape).to(result)
        return torch.autograd.grad(result, [*block.parameters(), *inputs], weight)

    exact = gradients(block.double() and torch.float64)
    plain = gradients(block.bfloat16() and torch.bfloat16)  # its LayerNorm on one thread of a CPU adds rows up in bfloat16
    block.fused = True
    if compiled:
        block.compile()
    for got, usual, wanted in zip(gradients(torch.bfloat16), plain, exact, strict=True):
        error, usual_error = (float((x.double() - wanted).norm() / wanted.norm()) for x in (got, usual))
        assert error < max(3e-2, 1.1 * usual_error)


def test_fused_evaluation_is_as_it_was() -> None:
    model = BinaryDenoiser(4, 8, width=8, depth=1, num_heads=2).eval()
    x_t, t = bk.random_bits(2, (4, 8), seed=0), torch.ones(2, dtype=torch.int64)
    before = model(x_t, t)
    fuse(model)
    assert torch.equal(model(x_t, t), before)
