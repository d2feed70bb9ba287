"""What a profile says: rows that add up to the measured latency."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console, Group

from .recording import Activity, Recording
from .table import draw_table
from .trace import trace_events

STEP = re.compile(r"step (\d+)(?:/|$)")  # how the path of what runs in a step begins
AROUND = "around the steps"
GAPS, HOST, PROFILER = "gaps", "host", "profiler"  # kinds of rows that are no parts


@dataclass(frozen=True)
class Row:
    """Milliseconds of one call of a phase.

    Attributes:
        part: path of the part, for example "denoiser/block 3/attention"; what ran in a part but in none inside it has the path of
            the part itself.
        kind: "part": kernels at work (on a CPU: operators); "gaps": none at work between the first and the last; "host": before
            the first and after the last; "profiler": what the profiler added, negative.
        ms: median call; the rows of a phase add up to `Phase.ms`.
        gap_ms: of a part, the idle time in front of its kernels, already counted in the row of the gaps.
        count: kernels and copies, or operators.
    """

    part: str
    kind: str
    ms: float
    gap_ms: float = 0.0
    count: int = 0


@dataclass(frozen=True)
class Phase:
    """One call: all steps of a sampler, or a decoding.

    Attributes:
        ms: the call as it really runs, host to host, without the profiler: the median of `repeats`.
        steps: how many it has; 0 for a decoding.
        rows: in the order in which the parts first ran.
        step_ms: of each step, from the end of the one before it (of the first, from its own start) to its own end.
        note: how parts were told apart, or why they could not be.
    """

    name: str
    ms: float
    steps: int
    rows: tuple[Row, ...]
    step_ms: tuple[float, ...]
    note: str
    recording: Recording

    @property
    def ms_per_step(self) -> float:
        return self.ms / max(self.steps, 1)


@dataclass(frozen=True)
class Profile:
    """Where the time of sampling goes: `phases`, as a table, a picture or a trace."""

    title: str
    phases: tuple[Phase, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows of all phases."""
        return [row for phase in self.phases for row in phase.rows]

    def table(self, each: bool = False) -> Group:
        """For `rich.print`; with `each`, one line for each of many parts alike instead of one for all of them."""
        return draw_table(self, each)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=110)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def plot(self, path: str | Path) -> None:
        """Write a picture (PNG, or what the suffix says)."""
        from .plot import draw_plot  # matplotlib takes a second to import

        draw_plot(self, Path(path))

    def trace(self, path: str | Path) -> None:
        """Write a Chrome trace (JSON) for Perfetto: everything the profiler saw, and a track of the parts."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": trace_events(self), "displayTimeUnit": "ms", "title": self.title}))


def exclusive(activities: Sequence[Activity], start: float) -> Iterator[tuple[Activity, float, float]]:
    """(activity, idle time in front of it, time at work that no earlier one covers), in microseconds."""
    covered = start
    for activity in activities:
        idle = max(activity.start - covered, 0.0)
        yield activity, idle, max(activity.end - max(activity.start, covered), 0.0)
        covered = max(covered, activity.end)


def _row_name(path: str, in_steps: bool) -> str:
    """The path of a row: the same for all steps."""
    match = STEP.match(path)
    if match:
        return path[match.end() :] or "rest of the step"
    return "/".join(filter(None, (AROUND, path))) if in_steps else path or "rest"


def make_phase(name: str, ms: float, recording: Recording, note: str) -> Phase:
    """The rows of a recorded call that takes `ms` when nobody looks on."""
    in_steps = [path for path in recording.entered if STEP.fullmatch(path)]
    activities = recording.activities
    first = activities[0].start if activities else recording.end
    last = max((activity.end for activity in activities), default=recording.end)
    parts: dict[str, Row] = {}
    steps: list[tuple[str, float, float]] = []  # path, start, end
    for activity, idle, busy in exclusive(activities, first):
        match = STEP.match(activity.part)
        if match:
            begin = activity.start
            if steps and steps[-1][0] == match[1]:
                begin = steps.pop()[1]
            steps.append((match[1], begin, activity.end))
        path = _row_name(activity.part, bool(in_steps))
        row = parts.get(path, Row(path, "part", 0.0))
        parts[path] = Row(path, "part", row.ms + busy / 1e3, row.gap_ms + idle / 1e3, row.count + 1)
    rows = list(parts.values())
    rows.append(Row(GAPS, GAPS, sum(row.gap_ms for row in rows)))
    rows.append(Row(HOST, HOST, recording.span_ms - (last - first) / 1e3))
    rows.append(Row(PROFILER, PROFILER, ms - recording.span_ms))
    begins = [begin for _, begin, _ in steps[:1]] + [end for _, _, end in steps[:-1]]
    step_ms = tuple((end - begin) / 1e3 for begin, (_, _, end) in zip(begins, steps, strict=True))
    return Phase(name, ms, len(in_steps), tuple(rows), step_ms, note, recording)
