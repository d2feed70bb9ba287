"""The optimiser's step in one pass over memory: AdamW, clipping, the moving average and the copy that computes."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

ALIGNMENT = 64  # elements: what matrix products want of their operands, in any dtype


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) on weights that lie one after the other in memory, so that a step is one kernel.

    Reading and writing 18 bytes a weight each is all that it takes: gradient (2 in bfloat16), weight, two moments and average (4
    each), and the bfloat16 copy (2). On a GPU the pass is compiled; elsewhere it is what it says. A parameter without a gradient
    counts as one whose gradient is zero.

    Args:
        model: float32 parameters; they move into one block of memory, and so do those of the next two.
        average: the same model again, whose parameters follow as an exponential moving average.
        copy: the same model in the dtype it computes in, or None if `model` itself does.
        betas, eps, weight_decay: as in `torch.optim.AdamW`, whose `state_dict` this one's is like.
        processes: of torch.distributed, all of them if more than one: they begin with the weights of the first, and every step
            takes the mean of their gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        copy: nn.Module | None,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        processes: int = 1,
    ):
        self.betas, self.weight_decay, self.eps, self.processes, self.steps = betas, weight_decay, eps, processes, 0
        self._computing = list((model if copy is None else copy).parameters())
        self._shapes = [p.shape for p in model.parameters()]
        self.weights, self.average = self._gather(model.parameters()), self._gather(average.parameters())
        self.copies = None if copy is None else self._gather(copy.parameters())
        self.gradient = torch.zeros_like(self.weights if self.copies is None else self.copies)
        self._gradients = self._views(self.gradient)
        self.moments = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self._pass = torch.compile(_pass, fullgraph=True) if self.weights.is_cuda else _pass
        if processes > 1:
            distributed.broadcast(self.weights, 0)
            self.average.copy_(self.weights)
            self.refresh()

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, first = [], 0
        for shape in self._shapes:
            views.append(flat[first : first + shape.numel()].view(shape))
            first += _aligned(shape.numel())
        return views

    @torch.no_grad()
    def _gather(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Move parameters into one block of memory, which is returned."""
        parameters = list(parameters)
        flat = parameters[0].new_zeros(sum(_aligned(p.numel()) for p in parameters))
        for parameter, view in zip(parameters, self._views(flat), strict=True):
            view.copy_(parameter)
            parameter.data = view
        return flat

    @torch.no_grad()
    def step(self, lr: float, clip: float, decay: float) -> None:
        """Use up the gradients: clip their norm, move the weights, then the average by 1 - decay towards them, then the copy."""
        self.steps += 1
        pairs = [(view, p.grad) for view, p in zip(self._gradients, self._computing, strict=True) if p.grad is not None]
        if len(pairs) < len(self._computing):
            self.gradient.zero_()
        torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
        for parameter in self._computing:
            parameter.grad = None
        if self.processes > 1:
            distributed.all_reduce(self.gradient)  # their sum
        norm = torch.linalg.vector_norm(self.gradient, dtype=torch.float32) / self.processes
        scale = (clip / (norm + 1e-6)).clamp(max=1.0) / self.processes  # as torch.nn.utils.clip_grad_norm_
        b1, b2 = self.betas
        shrink, rate = 1 - lr * self.weight_decay, lr / (1 - b1**self.steps)
        numbers = torch.tensor([shrink, rate, 1 / math.sqrt(1 - b2**self.steps), self.eps, 1 - b1, 1 - b2, 1 - decay])
        numbers = numbers.to(self.weights.device, non_blocking=True)
        self._pass(self.gradient, self.weights, *self.moments, self.average, self.copies, scale, numbers)

    @torch.no_grad()
    def refresh(self) -> None:
        """The copy takes over the weights."""
        if self.copies is not None:
            self.copies.copy_(self.weights)

    def state_dict(self) -> dict[str, Any]:
        first, second = map(self._views, self.moments)
        moments = enumerate(zip(first, second, strict=True))
        step = float(self.steps)
        return {"state": {i: {"step": torch.tensor(step), "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in moments}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, flat in zip(("exp_avg", "exp_avg_sq"), self.moments, strict=True):
            for i, view in enumerate(self._views(flat)):
                view.copy_(state["state"][i][name])
        self.steps = int(state["state"][0]["step"])


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _pass(
    gradient: Tensor,
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor,
    copies: Tensor | None,
    scale: Tensor,
    numbers: Tensor,
) -> None:
    shrink, rate, bias2, eps, new1, new2, follow = numbers.unbind()
    g = gradient.float() * scale
    first.lerp_(g, new1)
    second.lerp_(g * g, new2)
    weights.mul_(shrink).sub_(rate * first / (second.sqrt() * bias2 + eps))
    average.lerp_(weights, follow)
    if copies is not None:
        copies.copy_(weights)
