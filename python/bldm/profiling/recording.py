"""One call under torch's profiler: what ran on the device (on a CPU: which operators), when, and for which part."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..parts import PREFIX, recording

CALL = "bldm call"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
# Where two sequences differ: how many to leave out of either, the fewest first, until so many in a row agree.
SKIPS = sorted(((a, b) for a in range(32) for b in range(32)), key=sum)[1:]
AGREEING = 3


@dataclass(frozen=True)
class Activity:
    """A kernel or a copy on the device, or an outermost operator on a CPU; times in microseconds.

    `part` is the innermost part it was launched from, "" for none; `in_graph`: by a CUDA graph, which knows no parts.
    """

    name: str
    start: float
    end: float
    part: str
    in_graph: bool
    event: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """A call from `start` to `end`: its activities in order of time, the paths of the parts it entered, all the events."""

    start: float
    end: float
    activities: list[Activity]
    entered: list[str]
    events: list[dict[str, Any]]

    @property
    def span_ms(self) -> float:
        return (self.end - self.start) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record(call: Callable[[], Any], device: torch.device) -> Recording:
    """Run `call` to its end on `device` under the profiler."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profiler, recording():
        with record_function(CALL):
            call()
            synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return read(events, device)


def read(events: list[dict[str, Any]], device: torch.device) -> Recording:
    """A recording from the events of a Chrome trace, as torch's profiler writes it."""
    spans = [event for event in events if event.get("ph") == "X"]
    (whole,) = [event for event in spans if event["name"] == CALL and event["cat"] == "user_annotation"]
    start, end = whole["ts"], _end(whole)
    operators = [event for event in spans if event["cat"] == "cpu_op" and event["tid"] == whole["tid"]]
    operators.sort(key=lambda event: (event["ts"], -event["dur"]))
    parts = [event for event in operators if event["name"].startswith(PREFIX)]
    if device.type == "cuda":
        launches = {event["args"].get("correlation"): event for event in spans if event["cat"] in LAUNCHES}
        work = [event for event in spans if event["cat"] in DEVICE_WORK]
        causes = [launches.get(event["args"].get("correlation")) for event in work]
        times = [event["ts"] if cause is None else cause["ts"] for event, cause in zip(work, causes, strict=True)]
        graphed = [cause is not None and "GraphLaunch" in cause["name"] for cause in causes]
    else:
        work = _outermost(event for event in operators if not event["name"].startswith(PREFIX))
        times, graphed = [event["ts"] for event in work], [False] * len(work)
    activities = [
        Activity(event["name"], event["ts"], _end(event), part, in_graph, event)
        for event, part, in_graph in zip(work, innermost(parts, times), graphed, strict=True)
        if start <= event["ts"] <= end
    ]
    activities.sort(key=lambda activity: activity.start)
    return Recording(start, end, activities, [event["name"].removeprefix(PREFIX) for event in parts], events)


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _outermost(operators: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are in no other, of operators in order of start, the outer first."""
    found: list[dict[str, Any]] = []
    for event in operators:
        if not found or event["ts"] >= _end(found[-1]):
            found.append(event)
    return found


def innermost(ranges: Sequence[dict[str, Any]], times: Sequence[float]) -> list[str]:
    """Of each time, the path of the innermost of the nested `ranges` (in order of start, the outer first), or ""."""
    found = [""] * len(times)
    open_ranges: list[dict[str, Any]] = []
    upcoming = iter([*ranges, None])
    following = next(upcoming)
    for i in sorted(range(len(times)), key=times.__getitem__):
        while following is not None and following["ts"] <= times[i]:
            while open_ranges and _end(open_ranges[-1]) <= following["ts"]:
                open_ranges.pop()
            open_ranges.append(following)
            following = next(upcoming)
        while open_ranges and _end(open_ranges[-1]) < times[i]:
            open_ranges.pop()
        if open_ranges:
            found[i] = open_ranges[-1]["name"].removeprefix(PREFIX)
    return found


def parts_by_order(replayed: Recording, plain: Recording) -> tuple[Recording, float]:
    """`replayed` with the parts of what its CUDA graph ran, and the share of that which was found in `plain`.

    `plain` is the same call without a graph. The kernels of a graph run in the order in which they were captured, so the same
    kernel at the same place belongs to the same part; one that is not in `plain` counts as what stands before it.
    """
    source = [activity for activity in plain.activities if activity.part]
    inside = [i for i, activity in enumerate(replayed.activities) if activity.in_graph]
    places = aligned([replayed.activities[i].name for i in inside], [activity.name for activity in source])
    activities, part = list(replayed.activities), ""
    for i, place in zip(inside, places, strict=True):
        part = part if place is None else source[place].part
        activities[i] = replace(activities[i], part=part)
    return replace(replayed, activities=activities, entered=plain.entered), 1 - places.count(None) / max(len(places), 1)


def aligned(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each of `names`, its place in `known`; None for a few that are not there. Places ascend."""
    places: list[int | None] = []
    j = 0
    while len(places) < len(names):
        i = len(places)
        if j < len(known) and names[i] == known[j]:
            places.append(j)
            j += 1
            continue
        ways = (
            (a, b) for a, b in SKIPS if (ahead := names[i + a : i + a + AGREEING]) and ahead == known[j + b : j + b + AGREEING]
        )
        a, b = next(ways, (len(names) - i, 0))  # no way on: nothing more is found
        places += [None] * a
        j += b
    return places
