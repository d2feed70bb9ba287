"""Functions of one tensor as CUDA graphs, one a shape: captured at the first call, replayed afterwards."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def fixed_algorithms() -> AbstractContextManager[None]:
    """The libraries' own choice of an algorithm, and nothing that varies between runs."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True)


class CapturedCall:
    """function(x) for inputs like `example`, as a graph with buffers of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor, pool: Any):
        self.input = example.clone()
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(example.device)
        side.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.device(example.device), fixed_algorithms():
            with torch.cuda.stream(side):
                function(self.input)  # compiles and measures what is compiled and measured at a first call
            side.synchronize()
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.output = function(self.input)
        torch.cuda.current_stream(example.device).wait_stream(side)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()


class GraphCache:
    """At most `limit` graphs, the least recently used one dropped first; they share one memory pool, so never run two at a time.

    With a limit of 0, while `enabled` is False, and on a CPU, functions are simply called.
    """

    def __init__(self, limit: int, device: torch.device):
        self.limit = limit if device.type == "cuda" else 0
        self.enabled = True
        self._pool = torch.cuda.graph_pool_handle() if self.limit else None
        self._calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self, name: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x); `name` must tell functions apart."""
        if x.device.type != "cuda":
            return function(x)
        if not (self.limit and self.enabled):
            with fixed_algorithms():
                return function(x)
        key = (name, x.shape, x.dtype)
        if key not in self._calls:
            while len(self._calls) >= self.limit:
                self._calls.popitem(last=False)
            self._calls[key] = CapturedCall(function, x, self._pool)
        self._calls.move_to_end(key)
        return self._calls[key](x)
