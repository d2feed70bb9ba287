"""A profile as a picture: what a step is made of, each part in the order in which they run, and each step."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .tree import Node, kind_of, tree_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import Phase, Profile

PALETTE = ("#3b7dd8", "#d9a441", "#2f9e5b", "#c8553d", "#8e5bb5", "#3aa6a6", "#d88bb0", "#7a8b3c", "#8c6d4f")
OTHER = "#9a9a9a"
IDLES = {"gaps": "#e3e3e3", "host": "#c4ccd6"}
MOST_LABELS = 60  # of parts under one axis


@dataclass(frozen=True)
class Place:
    """A part in the order in which they run, with the milliseconds of every kind of work in it ("norm" for norm1 and norm2)."""

    name: str
    kinds: dict[str, float]


def places(node: Node, share: float) -> Iterator[Place]:
    """One of many parts alike ("block 3") is a place made of what is inside; any other part is one if nothing is inside."""
    for child in node.below(each=True):
        if child.children and kind_of(child.name) is None:
            yield from places(child, share)
            continue
        kinds: dict[str, float] = {}
        for inner in child.below(each=True) if child.children else [child]:
            kind = re.sub(r"[ _]?\d+$", "", inner.name)
            kinds[kind] = kinds.get(kind, 0.0) + inner.ms * share
        yield Place(f"{node.name} {child.name}".strip() if child.name == "rest" else child.name, kinds)


def draw_plot(profile: "Profile", path: Path) -> None:
    heights = [height for phase in profile.phases for height in ((1.0, 2.6, 0.8) if phase.steps else (1.0, 2.6))]
    figure = Figure(figsize=(12, 0.5 + 1.5 * sum(heights)), layout="constrained")
    axes = iter(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for phase in profile.phases:
        found = list(places(tree_of(phase.rows), 1 / max(phase.steps, 1)))
        totals: dict[str, float] = {}
        for place in found:
            for kind, ms in place.kinds.items():
                totals[kind] = totals.get(kind, 0.0) + ms
        largest = sorted(totals, key=totals.__getitem__, reverse=True)[: len(PALETTE)]
        colours = {kind: colour for kind, colour in zip(largest, PALETTE, strict=False) if totals[kind] > 0}
        _draw_whole(next(axes), phase, totals, colours)
        _draw_places(next(axes), phase, found, colours)
        if phase.steps:
            _draw_steps(next(axes), phase)
    figure.suptitle(profile.title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_whole(axis: "Axes", phase: "Phase", totals: dict[str, float], colours: dict[str, str]) -> None:
    """One bar: all kinds of work, the gaps between, the host around; a line where the measured latency is."""
    share = 1 / max(phase.steps, 1)
    segments = [(kind, ms, colours[kind]) for kind, ms in totals.items() if kind in colours]
    segments.append(("other", sum(ms for kind, ms in totals.items() if kind not in colours), OTHER))
    segments += [(row.kind, row.ms * share, IDLES[row.kind]) for row in phase.rows if row.kind in IDLES]
    whole = max(sum(ms for _, ms, _ in segments), phase.ms_per_step)
    left = 0.0
    for name, ms, colour in segments:
        axis.barh(0, ms, 0.8, left, color=colour)
        if ms > 0.05 * whole:
            axis.text(left + ms / 2, 0, f"{name}\n{ms:.3g} ms", ha="center", va="center", fontsize=8)
        left += ms
    axis.axvline(phase.ms_per_step, color="black", linewidth=1.2, linestyle="--")
    axis.set(yticks=[], xlim=(0, whole * 1.02))
    axis.spines[["top", "right", "left"]].set_visible(False)
    what = f"a step of {phase.name}, mean of {phase.steps}" if phase.steps else phase.name
    text = f"{what}: {phase.ms_per_step:.3g} ms without the profiler (dashed); the parts under the profiler, in ms"
    axis.set_title(text, fontsize=10, loc="left")
    axis.tick_params(labelsize=8)


def _draw_places(axis: "Axes", phase: "Phase", found: list[Place], colours: dict[str, str]) -> None:
    """A stacked bar for each part, from left to right as they run."""
    for x, place in enumerate(found):
        bottom = 0.0
        for kind, ms in place.kinds.items():
            axis.bar(x, ms, 0.8, bottom, color=colours.get(kind, OTHER))
            bottom += ms
    every = -(-len(found) // MOST_LABELS)
    axis.set_xticks(range(0, len(found), every), [place.name for place in found[::every]], rotation=45, ha="right", fontsize=8)
    axis.set_ylabel("ms a step" if phase.steps else "ms", fontsize=9)
    axis.set_xlim(-0.7, len(found) - 0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in {**colours, "other": OTHER, **IDLES}.items()]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1.1), frameon=False, fontsize=8)


def _draw_steps(axis: "Axes", phase: "Phase") -> None:
    axis.bar(range(len(phase.step_ms)), phase.step_ms, 0.8, color=PALETTE[0])
    axis.set_ylabel("ms", fontsize=9)
    axis.set_xlabel("step, under the profiler", fontsize=8)
    axis.set_xlim(-0.7, len(phase.step_ms) - 0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
