"""Runs cases: every provider is checked, then timed, and becomes a row."""

import csv
import datetime
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import bldm_kernels as bk

from ..checkpoint import write_atomically
from .cases import Case, Opponent, Problem
from .checks import WrongResult, poison
from .timing import Timer, copy_bandwidth

BACKENDS = ("triton", "cuda", "cpu")
PROVIDERS = ("eager", "matmul", "compile", *BACKENDS)


@dataclass(frozen=True)
class Row:
    """One line of a result file: p20, p50, p80 in the unit of `metric`.

    fraction: bytes / p50 over the copy bandwidth measured in the same run. ratio: how many times faster than eager, by time a bit
    (None without eager).
    """

    op: str
    provider: str
    config: str
    metric: str
    p20: float
    p50: float
    p80: float
    bits: int
    bytes: int
    fraction: float
    ratio: float | None
    device: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass
class Report:
    """Rows, and one line for everything that was left out (`skipped`) or is wrong (`failures`)."""

    bandwidth: float
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Unavailable(Exception):
    """A provider that does not work on this machine."""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of this source tree, or the version of the installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {bk.__version__}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _machine(device: torch.device, source: str) -> dict[str, str]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": source,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _missing(name: str, device: torch.device) -> str | None:
    """Why a provider cannot run on the device, or None."""
    if name not in BACKENDS:
        return None
    backend = bk.backends()[name]
    return backend.unavailable or (None if device.type in backend.devices else f"does not run on {device.type}")


@contextmanager
def _backend(name: str, problem: Problem) -> Iterator[Callable[[], Any]]:
    """The op on a forced backend, checked."""
    with bk.use_backend(name):
        for out in problem.outputs:
            poison(out)
        problem.check(problem.run())
        yield problem.run


@contextmanager
def _opponent(opponent: Opponent, compiled: bool) -> Iterator[Callable[[], Any]]:
    """The op in plain PyTorch, checked."""
    function = opponent.function
    if compiled:
        import torch._inductor.config as inductor  # here, because importing it takes seconds
        from torch._dynamo.exc import BackendCompilerFailed

        inductor.compile_threads = 1  # else a pool of processes starts in the background, beside what is being timed
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
        try:
            opponent.call(function)
        except BackendCompilerFailed as error:
            raise Unavailable(" ".join(str(error).split())[:200]) from error
    opponent.check(opponent.call(function))
    yield lambda: opponent.call(function)


def _checked(name: str, problem: Problem) -> AbstractContextManager[Callable[[], Any]] | None:
    """What to time; None where the provider does not apply to the op."""
    if name in BACKENDS:
        return _backend(name, problem)
    opponent = problem.matmul if name == "matmul" else problem.eager
    return None if opponent is None else _opponent(opponent, compiled=name == "compile")


def _time(case: Case, name: str, problem: Problem, timer: Timer, report: Report, machine: dict[str, str]) -> None:
    checked = _checked(name, problem)
    if checked is None:
        return
    with checked as function:
        timing = timer.in_graph(function) if case.in_graph else timer(function)
    share = 1.0 if name in BACKENDS else problem.share
    bits, moved = round(problem.bits * share), round(problem.bytes * share)
    eager = [r for r in report.rows if (r.op, r.config, r.provider) == (case.op, case.config, "eager")]
    seconds = timing.p50 * 1e-3
    row = Row(
        op=case.op,
        provider=name,
        config=case.config,
        metric="ms in a graph of 20" if case.in_graph else "ms",
        p20=timing.p20,
        p50=timing.p50,
        p80=timing.p80,
        bits=bits,
        bytes=moved,
        fraction=moved / seconds / report.bandwidth,
        ratio=1.0 if name == "eager" else (eager[0].p50 / eager[0].bits) / (timing.p50 / bits) if eager else None,
        **machine,
    )
    report.rows.append(row)


def run(
    chosen: Iterable[Case],
    device: torch.device,
    providers: Iterable[str] | None = None,
    *,
    source: str | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Check and time every case with every provider (default: those that can run on the device; eager always comes first).

    A provider that is missing, or a problem larger than the memory, is skipped with its reason; a provider whose result is wrong
    or that raises is a failure and is not timed. Neither stops the run.
    """
    if providers is None:
        providers = ("eager", "matmul", "compile", *(("triton", "cuda") if device.type == "cuda" else ("cpu",)))
    names = [name for name in PROVIDERS if name in set(providers)]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        timer = timer or Timer(device)
        report = Report(copy_bandwidth(timer))
        for name in names.copy():
            if reason := _missing(name, device):
                report.skipped.append(f"{name}: {reason}")
                names.remove(name)
        machine = _machine(device, source or commit())
        for case in chosen:
            _run_case(case, names, timer, report, machine, progress)
    return report


def _run_case(
    case: Case, names: list[str], timer: Timer, report: Report, machine: dict[str, str], progress: Callable[[str], None]
) -> None:
    try:
        problem = case.make(timer.device)
    except torch.OutOfMemoryError:
        report.skipped.append(f"{case.op} {case.config}: not enough memory for the inputs")
        return
    for name in names:
        label = f"{case.op} {case.config}, {name}"
        progress(label)
        try:
            _time(case, name, problem, timer, report, machine)
        except (Unavailable, torch.OutOfMemoryError) as error:
            reason = "not enough memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            report.skipped.append(f"{label}: {reason}")
        except WrongResult as error:
            report.failures.append(f"{label}: {error}")
        except Exception as error:
            report.failures.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if timer.device.type == "cuda":
            torch.cuda.empty_cache()


def write_csv(rows: list[Row], path: Path) -> None:
    """Write a result file whole or not at all."""

    def write(name: str) -> None:
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})

    write_atomically(path, write)
