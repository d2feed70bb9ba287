"""A sampling loop as one CUDA graph: captured once, replayed with whatever its buffers hold; a bounded cache of them."""

import time
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .loop import Inputs, Loop


class Uncapturable(Exception):
    """Why a loop cannot be a graph."""


@dataclass(frozen=True)
class GraphInfo:
    """One cached graph: what it samples, the bytes of its own buffers, and the seconds that the rehearsal before it (compilation
    included) and the capture itself took."""

    num_samples: int
    num_steps: int
    buffer_bytes: int
    rehearsal_seconds: float
    capture_seconds: float


class HostConstants(TorchDispatchMode):
    """Serves the copies that a denoiser makes of constants from the CPU, such as frequencies of a time embedding.

    Such a copy waits for the device, so it cannot be captured. All inputs of the denoiser are on the device, so what it copies
    from the CPU is a constant: the first copy of a content is kept, later ones are clones of it on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Hashable, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == "cuda":
                source: Tensor = args[0]
                content = source.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                dtype = kwargs.get("dtype") or source.dtype
                key = (content, source.dtype, tuple(source.shape), dtype, device)
                if key not in self._kept:
                    self._kept[key] = func(*args, **kwargs)
                return self._kept[key].clone()
        return func(*args, **kwargs)


@contextmanager
def _forbid_synchronisation() -> Iterator[None]:
    """An operation that waits for the device is an error: it would break the capture in a less orderly way."""
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


class CapturedLoop:
    """A loop and its graph. Raises `Uncapturable`, with the reason, for a loop that waits for the device or the like."""

    def __init__(self, loop: Loop, inputs: Inputs, pool: Any):
        began = time.perf_counter()
        self.loop, self.graph = loop, torch.cuda.CUDAGraph()
        device = loop.execution.device
        # Compiled code is not to be traced anew under a mode; it has `Execution.context` for its constants.
        self.constants = nullcontext() if loop.execution.compiled else HostConstants()
        loop.load(inputs)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.device(device), self.constants:
                with torch.cuda.stream(side):
                    loop.rehearse()
                    with _forbid_synchronisation():
                        loop.rehearse()
                torch.cuda.current_stream(device).wait_stream(side)
                side.synchronize()
                rehearsed = time.perf_counter()
                torch.clear_autocast_cache()  # what it holds would be freed while the graph still reads it
                with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    loop.run()
        except RuntimeError as error:
            raise Uncapturable(str(error).split("\n")[0]) from error
        finally:
            torch.clear_autocast_cache()
        self.seconds = (rehearsed - began, time.perf_counter() - rehearsed)

    def replay(self, inputs: Inputs) -> Loop:
        self.loop.load(inputs)
        self.graph.replay()
        return self.loop

    def info(self) -> GraphInfo:
        tensors = [value for value in vars(self.loop).values() if isinstance(value, Tensor)]
        tensors += self.loop.hook_buffers.values()
        size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return GraphInfo(self.loop.plan.num_samples, self.loop.plan.num_steps, size, *self.seconds)


class GraphCache:
    """At most `limit` captured loops, the least recently used one dropped first; they share one memory pool."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[Hashable, tuple[Hashable, CapturedLoop]] = OrderedDict()
        self._pool: Any = None

    def find(self, key: Hashable, fingerprint: Hashable) -> CapturedLoop | None:
        """The graph of `key`, unless what it was captured with (weights' addresses, settings) is no longer so."""
        if key not in self._entries:
            return None
        known, captured = self._entries[key]
        if known != fingerprint:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return captured

    def capture(self, key: Hashable, fingerprint: Hashable, loop: Loop, inputs: Inputs) -> CapturedLoop:
        while len(self._entries) >= self.limit:
            self._entries.popitem(last=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        captured = CapturedLoop(loop, inputs, self._pool)
        self._entries[key] = (fingerprint, captured)
        return captured

    def infos(self) -> list[GraphInfo]:
        return [captured.info() for _, captured in self._entries.values()]

    def pool_bytes(self) -> int:
        """Device memory that the graphs' common pool holds."""
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(self._pool))

    def clear(self) -> None:
        self._entries.clear()
