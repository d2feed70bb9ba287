"""A module's forward and backward as CUDA graphs: a training step whose kernels wait for nobody to launch them."""

import gc

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls that compile and measure, before a capture


class Graphed(nn.Module):
    """Calls `module`; from the fourth call with arguments of the same shapes on, by replaying its kernels.

    Its output and gradients then are in memory that the next call writes to again. Calls with other shapes, without gradients or
    in evaluation mode run as they are. A replay draws from the generator's state as it is then, not as it was in the capture.
    When the fourth call comes, nothing may hold the autograd graph of an earlier one (a loss that was not detached): it would
    draw the stream of that call into the capture.

    Args:
        module: without buffers or hooks, of tensors; its parameters stay where they are in memory.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._shapes: tuple[object, ...] | None = None
        self._calls = 0
        self._replay: nn.Module | None = None

    def forward(self, *arguments: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self.module(*arguments)  # type: ignore[no-any-return]
        shapes = tuple((x.shape, x.dtype) for x in arguments)
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            return self.module(*arguments)  # type: ignore[no-any-return]
        self._calls += 1
        if self._calls <= WARM_UP:
            return self.module(*arguments)  # type: ignore[no-any-return]
        if self._replay is None:
            self._replay = captured(self.module, arguments)
        return self._replay(*arguments)  # type: ignore[no-any-return]


def captured(module: nn.Module, arguments: tuple[Tensor, ...]) -> nn.Module:
    """A module like this one that replays it; `module` itself stays as it is."""
    shell = _Shell(module)
    gc.collect()
    torch.cuda.empty_cache()  # what the calls before used, the graph has memory of its own for
    samples = tuple(x.clone() for x in arguments)
    return torch.cuda.make_graphed_callables(shell, samples, num_warmup_iters=0, allow_unused_input=True)  # type: ignore[return-value]


class _Shell(nn.Module):
    """What is changed to replay, in place of the module that it calls."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.module(*arguments)  # type: ignore[no-any-return]
