"""What a long run shows: a bar on a terminal, lines in a log."""

import io

import pytest
from bldm import progress
from bldm.progress import clock, progress_bar
from rich.console import Console


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with progress_bar(Console(file=log, width=40)) as bar:
        task = bar.add_task("training", total=100)
        for step in range(1, 101):
            now[0] += 1
            bar.update(task, completed=step, description=f"loss [{step}]")
        bar.advance(task, 0)
    lines = log.getvalue().splitlines()
    assert [text.split("  ")[:2] for text in lines] == [
        ["loss [31]", "31/100"],
        ["loss [61]", "61/100"],
        ["loss [91]", "91/100"],
        ["loss [100]", "100/100"],
    ]
    assert "left" not in lines[-1]


def test_a_short_run_is_one_line_in_a_log() -> None:
    log = io.StringIO()
    with progress_bar(Console(file=log)) as bar:
        for _ in bar.track(range(5), description="cases"):
            pass
    assert log.getvalue().startswith("cases  5/5  0:00:00") and log.getvalue().count("\n") == 1


def test_quiet_processes_say_nothing() -> None:
    log = io.StringIO()
    with progress_bar(Console(file=log, quiet=True)) as bar:
        bar.update(bar.add_task("training", total=1), completed=1)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    with progress_bar(Console(file=screen, force_terminal=True, width=100)) as bar:
        bar.update(bar.add_task("training", total=2), completed=2)
    assert "training" in screen.getvalue() and "2/2" in screen.getvalue() and "━" in screen.getvalue()


@pytest.mark.parametrize("seconds, shown", [(0, "0:00:00"), (61.9, "0:01:01"), (90061, "25:01:01")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
