"""The benchmark suite on tiny problems: rows are complete, and nothing wrong is ever timed."""

import csv
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from bldm.bench import OPS, Case, Report, Row, cases, run, timing, write_csv
from bldm.bench.checks import WrongResult, close, exact, nearest, rate
from bldm.bench.timing import Timer, Timing
from bldm.cli import app
from conftest import require_gpu
from typer.testing import CliRunner

import bldm_kernels as bk

CPU = torch.device("cpu")
SHAPE = (6, 5, 16)
table = sys.modules["bldm.bench.cases"]
TINY = [
    table.pack_bits(SHAPE, torch.float32),
    table.pack_bits(SHAPE, torch.uint8),
    table.unpack_bits(SHAPE, torch.bfloat16),
    table.random_bits(SHAPE),
    table.binarize((6, 16, 3, 2), torch.float32),
    table.flip_step(SHAPE, torch.float32),
    table.flip_step(SHAPE, torch.bfloat16),
    table.flip_probability(SHAPE, torch.bfloat16),
    table.add_noise(SHAPE),
    table.flip_loss(SHAPE, torch.float32),
    table.flip_loss(SHAPE, torch.bfloat16, balanced=True),
    table.embed_bits(SHAPE, 12, torch.float32),
    table.hamming_distance(SHAPE),
    table.hamming_topk(3, 100, 50, sample_bytes=16),
    table.hamming_topk(1, 40, 40, sample_bytes=16),
]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**20)


class CountingTimer(Timer):
    """Calls each function once."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.calls = 0

    def __call__(self, function, *, flush: bool = True) -> Timing:  # noqa: ANN001
        function()
        self.calls += 1
        return Timing(1.0, 2.0, 4.0)


def measure(chosen: list[Case], *providers: str, timer: Timer | None = None) -> Report:
    return run(chosen, CPU, providers or ("eager", "matmul", "cpu"), source="abc", timer=timer or CountingTimer())


def test_rows_are_complete() -> None:
    report = measure(TINY)
    assert report.failures == [] and report.skipped == [] and report.bandwidth > 0
    assert {row.op for row in report.rows} == set(OPS)
    assert {(row.op, row.config, row.provider) for row in report.rows if row.provider != "matmul"} == {
        (case.op, case.config, provider) for case in TINY for provider in ("eager", "cpu")
    }
    assert {row.op for row in report.rows if row.provider == "matmul"} == {"embed_bits", "hamming_topk"}
    for row in report.rows:
        assert (row.p20, row.p50, row.p80, row.metric) == (1.0, 2.0, 4.0, "ms")
        assert row.bits > 0 and row.bytes > 0 and row.fraction == pytest.approx(row.bytes / 2e-3 / report.bandwidth)
        assert row.commit == "abc" and row.torch == torch.__version__ and row.device and row.triton
        assert len(row.date) == 10


def test_the_ratio_is_by_time_a_bit() -> None:
    """Where the opponents work on a part of the problem, equal times mean that they are slower."""
    rows = {(row.op, row.config, row.provider): row for row in measure(TINY).rows}
    assert rows["flip_step", "6x5x16 float32", "cpu"].ratio == 1.0
    found = rows["hamming_topk", "3 of 100 x 16 bytes", "cpu"]
    assert found.ratio == pytest.approx(2.0) and found.bits == 3 * 100 * 128
    assert rows["hamming_topk", "3 of 100 x 16 bytes", "eager"].bits == 3 * 50 * 128
    assert [row.ratio for row in measure(TINY[:1], "cpu").rows] == [None]


def test_bytes_are_those_of_the_packed_op() -> None:
    found = {(row.op, row.config): row.bytes for row in measure(TINY, "cpu").rows}
    assert found["pack_bits", "6x5x16 float32"] == 480 * 4 + 60
    assert found["flip_step", "6x5x16 bfloat16"] == 480 * 2 + 60 + 60
    assert found["add_noise", "6x5x16"] == 120
    assert found["flip_loss", "6x5x16 float32 forward + backward"] == 480 * 4 * 3 + 4 * 60
    assert found["embed_bits", "6x5x16 -> 12 float32"] == 60 + (16 * 12 + 30 * 12) * 4


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.config}")
def test_a_wrong_kernel_is_refused_before_it_is_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that changes one element of the right result, and one that writes nothing."""
    kernels = bk.backends()["cpu"].kernels
    name = f"{case.op}_backward" if "backward" in case.config else case.op
    right = kernels[name]

    def off_by_one(*args: object) -> None:
        right(*args)
        out = args[-1]
        assert isinstance(out, torch.Tensor)
        out.view(-1)[-1] += 1

    for wrong in (off_by_one, lambda *args: None):
        monkeypatch.setitem(kernels, name, wrong)
        timer = CountingTimer()
        report = measure([case], "cpu", timer=timer)
        assert report.rows == [] and timer.calls == 1, "only the copy is timed"
        assert len(report.failures) == 1 and report.failures[0].startswith(f"{case.op} {case.config}, cpu: ")


def test_a_kernel_that_raises_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("launch\nfailed")

    monkeypatch.setitem(bk.backends()["cpu"].kernels, "pack_bits", broken)
    report = measure([TINY[0], TINY[2]])
    assert report.failures == [f"{TINY[0].op} {TINY[0].config}, cpu: RuntimeError: launch failed"]
    assert [(row.op, row.provider) for row in report.rows] == [
        ("pack_bits", "eager"),
        ("unpack_bits", "eager"),
        ("unpack_bits", "cpu"),
    ]


def test_on_a_gpu() -> None:
    """Events, flushed caches and graphs; every backend of the device."""
    require_gpu()
    shape, dtype = (64, 16, 64), torch.bfloat16
    chosen = [
        table.pack_bits(shape, dtype),
        table.flip_step(shape, dtype),
        table.flip_step(shape, dtype, in_graph=True),
        table.flip_loss(shape, dtype),
        table.flip_loss(shape, dtype, balanced=True, in_graph=True),
        table.flip_probability(shape, dtype, in_graph=True),
        table.embed_bits(shape, 96, dtype),
        table.hamming_topk(3, 100, 50),
    ]
    report = run(chosen, torch.device("cuda"), ("eager", "matmul", "triton", "cuda"), source="abc")
    assert report.failures == [] and report.skipped == []
    assert len(report.rows) == 3 * len(chosen) + 2
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in report.rows)


def test_a_wrong_opponent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bldm.bench.plain.add_noise", lambda x, kept: x)
    report = measure([table.add_noise((64, 16, 64))], "eager")
    assert report.rows == [] and "bits set, expected" in report.failures[0]


def test_missing_providers_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bk.dispatch._registry, "cuda", bk.Backend("cuda", ("cuda",), "no nvcc"))
    monkeypatch.setitem(bk.dispatch._registry, "triton", bk.Backend("triton", ("cuda",)))
    report = measure(TINY[:3], "triton", "cuda", "cpu")
    assert report.skipped == ["triton: does not run on cpu", "cuda: no nvcc"]
    assert [row.provider for row in report.rows] == ["cpu"] * 3


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("bldm.bench.plain.pack", large)
    report = measure(TINY[:1])
    assert report.skipped == [f"pack_bits {TINY[0].config}, eager: not enough memory"]
    assert [(row.provider, row.ratio) for row in report.rows] == [("cpu", None)]
    report = measure([Case("pack_bits", "huge", large)])
    assert report.skipped == ["pack_bits huge: not enough memory for the inputs"]


def test_checks() -> None:
    nan, half = torch.tensor([1.0, math.nan]), torch.full((64, 1000), 0.5, dtype=torch.float64)
    for check, wrong in (
        (exact(torch.zeros(3)), torch.tensor([0.0, 0.0, 1.0])),
        (exact(torch.zeros(3)), torch.zeros(1)),
        (close(torch.ones(2), 1e-3), nan),
        (close(torch.ones(2), 1e-3), torch.tensor([1.0, 1.01])),
        (rate(lambda out: out, lambda part: half[part], 64), torch.ones(64, 1000)),
    ):
        with pytest.raises(WrongResult):
            check(wrong)
    queries, database = (torch.randint(0, 256, (n, 4), dtype=torch.uint8) for n in (5, 60))
    distances, indices = bk.hamming_topk(queries, database, 7)
    check = nearest(queries, database, 7)
    check((distances, indices))
    for i in range(5):
        swapped = indices.clone()
        swapped[i, :2] = swapped[i, :2].flip(0)
        with pytest.raises(WrongResult):
            check((distances, swapped))


def test_timer() -> None:
    found = Timer(CPU, budget=0.01)(lambda: sum(range(1000)))
    assert 0 < found.p20 <= found.p50 <= found.p80
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Timing(2.0, 3.5, 5.0)


def test_torch_compile_is_timed_too() -> None:
    (row,) = measure([table.pack_bits(SHAPE, torch.uint8)], "compile").rows
    assert row.provider == "compile" and row.ratio is None


def test_every_op_has_its_cases_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    for size in ("small", "large"):
        assert {case.op for case in cases(size, cuda)} == set(OPS)
    every = cases("all", cuda)
    assert len({(case.op, case.config) for case in every}) == len(every)
    training = ["flip_probability", "flip_loss", "flip_loss"]
    assert [case.op for case in every if case.in_graph] == ["flip_step", *training, *training]
    assert not any(case.in_graph for case in cases("all", CPU))


# --- result files, pictures, the command ------------------------------------------------------------------------------
def test_a_result_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = measure(TINY[:2]).rows
    path = tmp_path / "new" / "rows.csv"
    write_csv(rows, path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [field.name for field in fields(Row)] and len(found) == len(rows)
    assert found[0]["op"] == "pack_bits" and float(found[0]["p50"]) == 2.0
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_csv([*rows, None], path)  # type: ignore[list-item]
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_plot(tmp_path: Path) -> None:
    write_csv(measure(TINY).rows, tmp_path / "machine.csv")
    script = Path(__file__).parent.parent / "benchmarks" / "plot.py"
    command = [sys.executable, str(script), str(tmp_path / "machine.csv"), "--images", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    for name in ("speed", "wall"):
        assert (tmp_path / f"machine-{name}.png").stat().st_size > 10_000


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bldm.cli.bench.cases", lambda size, device: TINY)
    arguments = ["bench", "--ops", "pack_bits,add_noise", "--providers", "eager,cpu", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "rows.csv"), "--commit", "abc"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "pack_bits 6x5x16 float32" in result.output and "x eager" in result.output
    assert "6 rows, copy bandwidth" in result.output
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 7

    monkeypatch.setitem(bk.backends()["cpu"].kernels, "add_noise", lambda *args: None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "FAILED: add_noise 6x5x16, cpu: " in result.output


@pytest.mark.parametrize("option", ["ops", "providers", "size"])
def test_command_names_what_is_wrong(option: str) -> None:
    result = CliRunner().invoke(app, ["bench", f"--{option}", "nothing", "--device", "cpu"])
    assert result.exit_code == 1 and f"error: {option}: 'nothing' is not one of " in result.stderr


def test_python_dash_m() -> None:
    assert importlib.util.find_spec("bldm.__main__")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where pytest found the packages
    command = [sys.executable, "-m", "bldm", "bench", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "bldm bench" in done.stdout
