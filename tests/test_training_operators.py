"""Operators of a training step: values and gradients against float64. Where there is no GPU, Triton's kernels are interpreted."""

from collections.abc import Callable

import pytest
import torch
from bldm.denoiser import BinaryDenoiser, Block
from conftest import require_gpu
from targets import HAS_GPU
from torch import Tensor
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference.attention import takes_whole_heads
from bldm_kernels.training.attention import attention, fits
from bldm_kernels.training.gelu import bias_gelu

DEVICE = "cuda" if HAS_GPU else "cpu"


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> list[Tensor]:
    """Of variance one; matrices of such that products are, too."""
    torch.manual_seed(0)
    made = [torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients by all tensors."""
    value = function(*tensors)
    torch.manual_seed(1)
    weight = torch.randn(value.shape).to(value.device, torch.bfloat16).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, tensors, weight)]


def check(function: Callable[..., Tensor], usual: Callable[..., Tensor], tensors: list[Tensor], limit: float) -> None:
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


def test_in_float64() -> None:
    assert torch.autograd.gradcheck(bias_gelu, random((2, 3, 5), (5,), dtype=torch.float64, device="cpu"))
    tensors = random((2, 4, 6), (18, 6), (18,), dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(lambda *x: attention(*x, 2), tensors)


@pytest.mark.parametrize("samples, tokens", [(2, 257), (64, 257), (8, 256), (5, 272)])
def test_attention_by_kernels(samples: int, tokens: int) -> None:
    require_gpu()
    tensors = random((samples, tokens, 768), (2304, 768), (2304,))
    if not takes_whole_heads(torch.empty(samples, tokens, 2304, dtype=torch.bfloat16, device="cuda"), 12):
        pytest.skip("the kernel is for compute capability 9.0")
    assert fits(tokens, 768, 12)
    check(lambda *x: attention(*x, 12), usual_attention(12), tensors, 1.5e-2)


@pytest.mark.parametrize("name", ["bias_gelu", "attention"])
def test_definitions(name: str) -> None:
    arguments = {
        "bias_gelu": (*random((2, 3, 8), (8,), dtype=torch.float32, device="cpu"),),
        "attention": (*random((2, 3, 8), (24, 8), (24,), dtype=torch.float32, device="cpu"), 2),
    }
    torch.library.opcheck(getattr(torch.ops.bldm, name).default, arguments[name])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_block_is_the_block(compiled: bool) -> None:
    """257 tokens for the operator of attention; values and gradients of all parameters."""
    torch.manual_seed(0)
    block = Block(64, 1, 4, 0.0).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 257, 64, device=DEVICE).bfloat16()
    parameters = list(block.parameters())
    exact = torch.autograd.grad(block.double()(x.double()).square().mean(), parameters)
    block.bfloat16().fused = True
    if compiled:
        block.compile()
    fused = torch.autograd.grad(block(x).float().square().mean(), parameters)
    for got, wanted in zip(fused, exact, strict=True):
        assert float((got.double() - wanted).norm() / wanted.norm()) < 3e-2


def test_fused_evaluation_is_as_it_was() -> None:
    model = BinaryDenoiser(4, 8, width=8, depth=1, num_heads=2).eval()
    x_t, t = bk.random_bits(2, (4, 8), seed=0), torch.ones(2, dtype=torch.int64)
    before = model(x_t, t)
    for block in model.blocks:
        block.fused = True  # type: ignore[assignment]
    assert torch.equal(model(x_t, t), before)
