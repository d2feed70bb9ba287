"""Calls of flip_loss and flip_probability go past the dispatcher: nothing that watches operators may miss them for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import TARGETS, Target
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bldm_kernels as bk

B, SHAPE = 3, (5, 12)
COEFFICIENTS = bk.BernoulliSchedule("linear", 16).coefficients([12, 6])[0]


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def bits(seed: int) -> Tensor:
    return bk.random_bits(B, SHAPE, seed=seed)


def loss(x: Tensor, **options: Any) -> Tensor:
    return bk.flip_loss(x, bits(1), bits(2), **options)


def probability(x: Tensor) -> Tensor:
    return bk.flip_probability(x, bits(1), COEFFICIENTS).sum()


CALLS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("flip_loss", lambda x: loss(x, balanced=True)),
    ("flip_probability", probability),
]
both = pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])


class Seen(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@both
def test_a_mode_sees_the_op_and_its_backward(name: str, call: Callable[[Tensor], Tensor]) -> None:
    x = logits()
    expected = torch.autograd.grad(call(x), x)[0]
    with Seen() as seen:
        gradient = torch.autograd.grad(call(x), x)[0]
    assert {name, f"{name}_backward"} <= set(seen.names) and torch.equal(gradient, expected)
    with Seen() as seen, torch.no_grad():
        call(x)
    assert name in seen.names


@both
def test_a_tracer_records_the_op(name: str, call: Callable[[Tensor], Tensor]) -> None:
    graph = make_fx(lambda x: call(x.detach()))(logits())
    assert getattr(torch.ops.bldm, name).default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(logits()), call(logits()))


@both
def test_a_parameter_is_differentiated_too(name: str, call: Callable[[Tensor], Tensor]) -> None:
    x = logits()
    parameter = torch.nn.Parameter(x.detach().clone())
    call(parameter).backward()
    call(x).backward()
    assert parameter.grad is not None and x.grad is not None and torch.equal(parameter.grad, x.grad)


@both
def test_the_second_derivative_is_refused(name: str, call: Callable[[Tensor], Tensor]) -> None:
    x = logits()
    (gradient,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@both
def test_no_graph_without_need(name: str, call: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        assert call(logits()).grad_fn is None
    assert call(logits().detach()).grad_fn is None
    with torch.inference_mode():
        assert call(logits()).is_inference()


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
def test_a_weight_may_be_learnt(reduction: str) -> None:
    """Its gradient is the losses; the op alone knows only that of the logits."""
    x, weight = logits(), torch.tensor([0.5, 2.0, 0.0], requires_grad=True)
    learnt = loss(x, weight=weight, reduction=reduction)
    fixed = loss(x, weight=weight.detach(), reduction=reduction)
    torch.testing.assert_close(learnt, fixed)
    wanted = torch.autograd.grad(learnt.sum(), (x, weight))
    torch.testing.assert_close(wanted[0], torch.autograd.grad(fixed.sum(), x)[0])
    bits_a_sample = {"mean": 1 / B, "sum": SHAPE[0] * SHAPE[1], "sample": 1}[reduction]
    torch.testing.assert_close(wanted[1], bits_a_sample * loss(x, reduction="sample").detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_weight_of_another_dtype(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, 2.0, 0.25], dtype=dtype)
    found = loss(logits(), weight=weight, reduction="sample")
    assert found.dtype == torch.float32 and torch.equal(found, loss(logits(), weight=weight.float(), reduction="sample"))


@pytest.mark.parametrize("target", TARGETS, ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(3, 9, 100), (2, 1030, 64)])
def test_the_loss_is_the_same_in_every_run(target: Target, shape: tuple[int, int, int]) -> None:
    """Sums are taken in a fixed order, over whole blocks of a sample and over parts of one."""
    if not target.fast and shape[1] > 100:
        pytest.skip("too slow without a GPU: covered by the other shape")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(target.device)
    x_0, x_t = (bk.random_bits(shape[0], shape[1:], seed=seed, device=target.device) for seed in (1, 2))
    losses = [bk.flip_loss(x, x_0, x_t, focal_gamma=0.0) for _ in range(5)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
