"""A profile as events of a Chrome trace: the profiler's own, and a track of the parts over what the device did."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recording import Recording
    from .result import Profile

TRACK = 10**8  # process number of the track of parts, which no process has
PAUSE = 1000.0  # microseconds between phases
Event = dict[str, Any]


def trace_events(profile: "Profile") -> list[Event]:
    """All phases on one time axis that starts at 0, one after the other."""
    events: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": TRACK, "args": {"name": "bldm: parts"}},
        {"ph": "M", "name": "process_sort_index", "pid": TRACK, "args": {"sort_index": -1}},
        {"ph": "M", "name": "thread_name", "pid": TRACK, "tid": 0, "args": {"name": "what the device is at work for"}},
    ]
    offset = 0.0
    for phase in profile.phases:
        shift = offset - phase.recording.start
        seen = (event for event in phase.recording.events if event.get("ph") != "M" or not offset)
        for event in (*seen, *_parts(phase.name, phase.recording)):
            events.append({**event, "ts": event["ts"] + shift} if "ts" in event else event)
        offset += phase.recording.end - phase.recording.start + PAUSE
    return events


def _parts(phase: str, recording: "Recording") -> Iterator[Event]:
    """Nested slices, the outer first: what is next to each other in the same part is one."""
    yield _slice(phase, phase, recording.start, recording.end)
    runs: list[tuple[list[str], float, float]] = []  # names of a path, start, end
    for activity in recording.activities:
        names = activity.part.split("/") if activity.part else []
        begin = max(activity.start, runs[-1][2]) if runs else activity.start
        if activity.end <= begin:
            continue  # covered by what runs beside it
        if runs and runs[-1][0] == names:
            begin = runs.pop()[1]
        runs.append((names, begin, activity.end))
    yield from _nested(runs, 0)


def _nested(runs: list[tuple[list[str], float, float]], depth: int) -> Iterator[Event]:
    i = 0
    while i < len(runs):
        names = runs[i][0]
        j = i + 1
        if len(names) > depth:
            while j < len(runs) and runs[j][0][: depth + 1] == names[: depth + 1]:
                j += 1
            yield _slice(names[depth], "/".join(names[: depth + 1]), runs[i][1], runs[j - 1][2])
            yield from _nested(runs[i:j], depth + 1)
        i = j


def _slice(name: str, path: str, start: float, end: float) -> Event:
    args = {"part": path}
    return {"ph": "X", "cat": "part", "name": name, "pid": TRACK, "tid": 0, "ts": start, "dur": end - start, "args": args}
