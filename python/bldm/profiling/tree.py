"""Rows as a tree of parts, where a run of numbered parts alike may be one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Row

NUMBERED = re.compile(r"(.*) (\d+)")


@dataclass
class Node:
    """A part with all that is inside it: milliseconds at work, idle in front of its kernels, how many of them."""

    name: str
    ms: float = 0.0
    gap_ms: float = 0.0
    count: int = 0
    children: dict[str, "Node"] = field(default_factory=dict)

    def add(self, names: list[str], row: "Row") -> None:
        """Count `row` here and along the path `names` below."""
        self.ms, self.gap_ms, self.count = self.ms + row.ms, self.gap_ms + row.gap_ms, self.count + row.count
        if names:
            self.children.setdefault(names[0], Node(names[0])).add(names[1:], row)

    def merge(self, other: "Node") -> None:
        self.ms, self.gap_ms, self.count = self.ms + other.ms, self.gap_ms + other.gap_ms, self.count + other.count
        for name, child in other.children.items():
            self.children.setdefault(name, Node(name)).merge(child)

    def rest(self) -> "Node | None":
        """What is in this part, but in none of those inside."""
        inside = list(self.children.values())
        count = self.count - sum(child.count for child in inside)
        if not inside or not count:
            return None
        ms, gap_ms = (getattr(self, name) - sum(getattr(child, name) for child in inside) for name in ("ms", "gap_ms"))
        return Node("rest", max(ms, 0.0), max(gap_ms, 0.0), count)

    def below(self, each: bool) -> list["Node"]:
        """The parts inside, those alike in a row as one ("block 0-5") unless `each`, and the rest."""
        nodes = list(self.children.values())
        if not each:
            runs = (list(run) for _, run in groupby(nodes, key=lambda node: kind_of(node.name) or id(node)))
            nodes = [_together(run) for run in runs]
        rest = self.rest()
        return nodes if rest is None else [*nodes, rest]


def kind_of(name: str) -> str | None:
    """What a number counts: "block" of "block 3"; None for a name without one."""
    match = NUMBERED.fullmatch(name)
    return match[1] if match else None


def _together(run: list[Node]) -> Node:
    if len(run) == 1:
        return run[0]
    last = NUMBERED.fullmatch(run[-1].name)
    assert last is not None
    whole = Node(f"{run[0].name}-{last[2]}")
    for node in run:
        whole.merge(node)
    return whole


def tree_of(rows: Iterable["Row"]) -> Node:
    """The root holds all rows that are parts."""
    root = Node("")
    for row in rows:
        if row.kind == "part":
            root.add(row.part.split("/"), row)
    return root
