"""flip_loss and flip_probability: their gradients, and the shortest way to call them.

Training calls these two in every step, on tensors that a GPU is done with in microseconds. So their autograd is written out, and
a call goes past the dispatcher where nothing can be watching it: half the time that the general layers of torch.library take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._diffusion_ops import run_flip_loss, run_flip_loss_backward, run_flip_probability, run_flip_probability_backward
from ._ops import library


def _is_watched(x: Tensor) -> bool:
    """Whether a mode, a transform, a tracer or a kind of tensor of its own must see the op."""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


class _FlipProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, x_t: Tensor, coefficients: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(logits, x_t, coefficients)
        ctx.options = options
        return _without_gradient("flip_probability", run_flip_probability, logits, x_t, coefficients, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        arguments = (grad, *ctx.saved_tensors, *ctx.options)
        return _without_gradient("flip_probability_backward", run_flip_probability_backward, *arguments), None, None, None, None


class _FlipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x_0: Tensor, x_t: Tensor, weight: Tensor | None, gamma: float, balanced: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        inputs = (logits, x_0, x_t, weight)
        loss, set_fraction = _without_gradient("flip_loss", run_flip_loss, *inputs, gamma, balanced, *options)
        ctx.save_for_backward(*inputs, set_fraction)
        ctx.options = (gamma, *options)
        ctx.mark_non_differentiable(set_fraction)
        ctx.set_materialize_grads(False)  # no zeros for the second
        return loss, set_fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        arguments = (grad, *ctx.saved_tensors, *ctx.options)
        gradient = _without_gradient("flip_loss_backward", run_flip_loss_backward, *arguments)
        return gradient, None, None, None, None, None, None, None


def _without_gradient(name: str, run: Callable[..., Any], *args: Any) -> Any:
    """The op below autograd: `run`, what it does there, unless someone is watching."""
    if not _is_watched(args[0]):
        return run(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.bldm, name).default(*args)


def _differentiable(name: str, run: Callable[..., Any], function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Registers `function` as the gradient of an op in its first argument. Returns the quickest way to call the op."""

    def autograd(*args: Any) -> Any:
        if args[0].requires_grad and torch.is_grad_enabled():
            return function.apply(*args)  # type: ignore[no-untyped-call]
        return _without_gradient(name, run, *args)

    def call(*args: Any) -> Any:
        return getattr(torch.ops.bldm, name).default(*args) if _is_watched(args[0]) else autograd(*args)

    library.impl(name, autograd, "Autograd")
    return call


flip_probability = _differentiable("flip_probability", run_flip_probability, _FlipProbability)
flip_loss = _differentiable("flip_loss", run_flip_loss, _FlipLoss)
