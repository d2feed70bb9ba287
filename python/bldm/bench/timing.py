"""How time is taken: device events with the caches flushed, replays of a CUDA graph, or the clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # written before every call on a GPU: several times the largest L2 (H200: 60 MB)
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # of the copy that measures the memory
MIN_REPEATS, MAX_REPEATS = 5, 100


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the 20th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(p20, statistics.median(samples), p80)


class Timer:
    """Times calls on one device: about `budget` seconds of calls each, but at least 5 and at most 100 of them.

    On a GPU the caches are flushed before every call, and the call is queued behind the flush, so that a kernel's time does not
    hold the time Python takes to launch it; several kernels a call can still be bound by their launches, as they are in use.
    On a CPU nothing is flushed.
    """

    def __init__(self, device: torch.device, budget: float = 0.25):
        self.device = device
        self.budget = budget
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any], *, flush: bool = True) -> Timing:
        self._warm_up(function)
        first = self._samples(function, 1, flush)[0]
        repeats = int(self.budget * 1e3 / max(first, 1e-3))
        return Timing.of(self._samples(function, min(max(repeats, MIN_REPEATS), MAX_REPEATS), flush))

    def in_graph(self, function: Callable[[], Any], calls: int = 20, replays: int = 10) -> Timing:
        """Of one call among `calls` in a CUDA graph, replayed `replays` times in a row; caches stay warm, as in a loop."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()

        def replay() -> None:
            for _ in range(replays):
                graph.replay()

        timing = self(replay, flush=False)
        each = 1 / (calls * replays)
        return Timing(timing.p20 * each, timing.p50 * each, timing.p80 * each)

    def _warm_up(self, function: Callable[[], Any]) -> None:
        """At least one call, and 50 ms: the clocks of an idle device rise slowly."""
        end = time.perf_counter() + 0.05
        while True:
            function()
            self._synchronize()
            if time.perf_counter() > end:
                return

    def _samples(self, function: Callable[[], Any], repeats: int, flush: bool) -> list[float]:
        if self.device.type != "cuda":
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                samples.append((time.perf_counter() - start) * 1e3)
            return samples
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            if flush:
                self._flush.fill_(1)
            begin.record()
            function()
            end.record()
        self._synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second, read plus written, of a large copy within the device's memory: the wall the rows are held against."""
    size = COPY_BYTES[timer.device.type]
    if timer.device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(timer.device)[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=timer.device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / (timer(lambda: target.copy_(source)).p50 * 1e-3)
