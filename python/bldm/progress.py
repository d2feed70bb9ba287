"""The progress of everything that takes a while: a bar on a terminal, now and then a line in a log."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS = 30.0  # between two lines


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console) if console.is_terminal else Lines(*columns, console=console, disable=True)


class Lines(Progress):
    """Where there is no terminal to draw on: a line of a task every `SECONDS`, and one when it is done."""

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self._due: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._report(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._report(task_id)

    def _report(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        due = self._due.setdefault(task_id, now + SECONDS)
        if now < due and not task.finished or due == float("inf"):
            return
        self._due[task_id] = float("inf") if task.finished else now + SECONDS
        self.console.print(escape(line(task)), highlight=False, soft_wrap=True)


def line(task: Task) -> str:
    """Name, done and total, time spent, time left."""
    total = "?" if task.total is None else f"{task.total:,.0f}"
    left = "" if task.time_remaining is None or task.finished else f", {clock(task.time_remaining)} left"
    return f"{task.description}  {task.completed:,.0f}/{total}  {clock(task.elapsed or 0)}{left}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
