"""A profile as a table: the tree of parts, what is in between, and the latency they add up to."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .tree import Node, tree_of

if TYPE_CHECKING:
    from .result import Phase, Profile


def draw_table(profile: "Profile", each: bool) -> Group:
    drawn = [Text(profile.title, style="bold")]
    return Group(*drawn, *(piece for phase in profile.phases for piece in _draw_phase(phase, each)))


def _draw_phase(phase: "Phase", each: bool) -> tuple[Text, Table, Text]:
    share = 1 / max(phase.steps, 1)
    title = f"{phase.name}: {phase.ms:.3f} ms a call"
    if phase.steps:
        spread = f"{min(phase.step_ms):.3f} to {max(phase.step_ms):.3f}"
        title += f", {phase.steps} steps of {phase.ms_per_step:.3f} ms (profiled: {spread})"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    for heading in ("ms a step" if phase.steps else "ms", "share", "idle before", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, ms: float, *rest: str, style: str | None = None) -> None:
        table.add_row(escape(name), f"{ms * share:.4f}", *rest, style=style)

    def percent(ms: float) -> str:
        return f"{ms / phase.recording.span_ms:.1%}"

    def add_below(node: Node, depth: int) -> None:
        for child in node.below(each):
            idle, calls = f"{child.gap_ms * share:.4f}", f"{child.count * share:.4g}"
            add("  " * depth + child.name, child.ms, percent(child.ms), idle, calls)
            add_below(child, depth + 1)

    add_below(tree_of(phase.rows), 0)
    table.add_section()
    for row in phase.rows:
        if row.kind in ("gaps", "host"):
            add(row.part, row.ms, percent(row.ms))
    table.add_section()
    add("under the profiler", phase.recording.span_ms, "100.0%")
    add("the profiler itself", phase.ms - phase.recording.span_ms)
    add("latency of a step" if phase.steps else "latency", phase.ms, style="bold")
    return Text(title), table, Text(phase.note, style="dim")
