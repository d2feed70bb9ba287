"""`bldm.profile` and `bldm profile`: rows that add up, parts with names, pictures and traces that open."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.cli import app
from bldm.parts import part, recording
from bldm.profiling import Phase, Profile
from bldm.profiling.modules import children_as_parts
from bldm.profiling.recording import aligned, innermost, parts_by_order, read
from bldm.profiling.result import make_phase
from conftest import require_gpu
from PIL import Image
from standins import bld
from targets import HAS_GPU
from tiny_models import tiny_denoiser, tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
BLOCK = ("norm", "qkv", "attention", "proj", "mlp")
DENOISER = {
    "denoiser/embed",
    "denoiser/time and condition",
    *(f"denoiser/block 0/{name}" for name in BLOCK),
    "denoiser/head",
    "flip",
}


def check_sums(phase: Phase) -> None:
    """The rows add up to the latency, those of the recording to the recording, and every kind of row is there."""
    by_kind = {kind: sum(row.ms for row in phase.rows if row.kind == kind) for kind in ("part", "gaps", "host", "profiler")}
    assert sum(row.ms for row in phase.rows) == pytest.approx(phase.ms)
    assert by_kind["part"] + by_kind["gaps"] + by_kind["host"] == pytest.approx(phase.recording.span_ms)
    assert by_kind["gaps"] == pytest.approx(sum(row.gap_ms for row in phase.rows))
    assert min(by_kind["part"], by_kind["host"]) > 0 and by_kind["gaps"] >= 0 and phase.ms > 0
    assert sum(row.count for row in phase.rows) == len(phase.recording.activities)
    assert all(row.count > 0 and row.ms >= 0 for row in phase.rows if row.kind == "part")
    assert len({row.part for row in phase.rows}) == len(phase.rows)


def parts(phase: Phase) -> set[str]:
    return {row.part for row in phase.rows if row.kind == "part"}


@pytest.fixture(scope="module", params=DEVICES)
def tiny(request: pytest.FixtureRequest) -> Profile:
    return bldm.profile(tiny_model().to(request.param), num_samples=2, steps=3, guidance_scale=2.0, repeats=3)


def test_a_model(tiny: Profile) -> None:
    sampling, decoding = tiny.phases
    assert (sampling.name, sampling.steps, decoding.name, decoding.steps) == ("sampling", 3, "decoding", 0)
    for phase in tiny.phases:
        check_sums(phase)
    assert tiny.rows == [*sampling.rows, *decoding.rows]
    assert parts(sampling) >= DENOISER and "the model marks" in sampling.note
    assert "rest" not in {path.split("/")[0] for path in parts(sampling)}
    assert {"embed", "decoder/ResidualBlock 0/conv1", "decoder/Upsample 2/conv"} <= parts(decoding)
    assert len(sampling.step_ms) == 3 and min(sampling.step_ms) > 0 and decoding.step_ms == ()
    assert sum(sampling.step_ms) <= sampling.recording.span_ms
    assert sampling.ms_per_step == sampling.ms / 3 and decoding.ms_per_step == decoding.ms


def test_a_graph_is_told_apart_by_the_order_of_its_kernels() -> None:
    require_gpu()
    model = tiny_model().cuda()
    phase = bldm.profile(model, num_samples=2, steps=3, repeats=1).phases[0]
    inside = [activity for activity in phase.recording.activities if activity.in_graph]
    assert len(inside) > 30 and all(activity.part for activity in inside) and "one CUDA graph" in phase.note
    plain = bldm.profile(model, num_samples=2, steps=3, repeats=1, graph=False).phases[0]
    assert not any(activity.in_graph for activity in plain.recording.activities) and "graph" not in plain.note
    counts = {row.part: row.count for row in phase.rows if row.part in DENOISER}
    assert counts == {row.part: row.count for row in plain.rows if row.part in DENOISER}


def test_table(tiny: Profile) -> None:
    lines = [line.split() for line in str(tiny).splitlines() if line.strip()]
    first = [line[0] for line in lines]
    for name in ("denoiser", "block", *BLOCK, "head", "flip", "gaps", "host", "decoder", "ResidualBlock"):
        assert name in first
    latencies = [line for line in lines if line[:2] == ["latency", "of"] or line[0] == "latency"]
    assert [float(line[-1]) for line in latencies] == [pytest.approx(phase.ms_per_step, abs=1e-4) for phase in tiny.phases]
    assert str(tiny).splitlines()[0].startswith("BinaryLatentDiffusion: 2 samples, guidance 2, ")


def test_table_of_parts_alike() -> None:
    torch.manual_seed(0)
    denoiser = bldm.BinaryDenoiser(num_positions=4, num_bits=8, num_steps=16, width=16, depth=3, num_heads=2).eval()
    sampler = bldm.FastSampler(denoiser, bk.BernoulliSchedule("linear", 16), latent_shape=(4, 8))
    found = bldm.profile(sampler, num_samples=2, steps=2, repeats=1)
    folded, each = (found.phases[0], str(found)), found.table(each=True)
    assert {f"denoiser/block {i}/mlp" for i in range(3)} <= parts(folded[0])
    assert "block 0-2" in folded[1] and "block 1" not in folded[1]
    from rich.console import Console

    with (console := Console(width=110)).capture() as captured:
        console.print(each)
    assert "block 1 " in captured.get() and "0-2" not in captured.get()


def test_picture(tiny: Profile, tmp_path: Path) -> None:
    tiny.plot(tmp_path / "new" / "profile.png")
    with Image.open(tmp_path / "new" / "profile.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_trace(tiny: Profile, tmp_path: Path) -> None:
    """Valid JSON, from time 0, with what the profiler saw and a track of parts whose slices nest."""
    tiny.trace(tmp_path / "new" / "trace.json")
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event.get("cat") == "part"]
    paths = [event["args"]["part"] for event in slices]
    assert {"sampling", "step 0", "step 2/denoiser/block 0/mlp", "step 1/flip", "decoding"} <= set(paths)
    assert any("ResidualBlock" in path for path in paths)
    assert slices[0]["ts"] == 0 and all(event["dur"] > 0 for event in slices)
    assert any(
        event.get("cat") in ("kernel", "cpu_op") and "addmm" in event["name"] or "gemm" in event["name"] for event in events
    )
    ends: list[float] = []
    for event in slices:
        while ends and ends[-1] <= event["ts"] + 1e-3:
            ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3, event
        ends.append(event["ts"] + event["dur"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_foreign_model(device: str) -> None:
    """Parts are its modules; nothing of the profile stays behind in it."""
    model = bld.BinaryDiffusion(dataset="laion").to(device)
    fast = bldm.accelerate(model)
    label = torch.tensor([0, 100, 200, 0], device=device)
    found = bldm.profile(fast, call=lambda fast: fast.sample(sample_steps=4, b=4, label=label, guidance=1.0), repeats=2)
    (phase,) = found.phases
    check_sums(phase)
    assert phase.steps == 4 and {"state", "denoiser/logits", "flip"} <= parts(phase)
    assert "its tree of modules" in phase.note and found.title.startswith("BinaryDiffusion: ")
    assert fast.samplers[0].graph
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_sampler_of_a_plain_function() -> None:
    """Steps of several batches; a denoiser without modules is one part."""
    sampler = bldm.FastSampler(lambda x, t: 2 * x, bk.BernoulliSchedule("linear", 16), latent_shape=(4, 8), state="bits")
    found = bldm.profile(sampler, call=lambda sampler: sampler.sample(4, 3, batch_size=2), repeats=1)
    (phase,) = found.phases
    check_sums(phase)
    assert phase.steps == 6 == len(phase.step_ms) and {"state", "denoiser", "flip"} <= parts(phase)


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine(device: str) -> None:
    """The engine marks its own parts, though it is a module."""
    engine = tiny_denoiser().to(device).optimize("float32")
    sampler = bldm.FastSampler(engine, bk.BernoulliSchedule("linear", 16), latent_shape=(4, 8))
    found = bldm.profile(sampler, num_samples=2, steps=3, repeats=1)
    (phase,) = found.phases
    check_sums(phase)
    assert {
        "embed",
        "block 0/qkv",
        "block 0/attention",
        "block 0/proj",
        "block 0/mlp up",
        "block 0/mlp down",
        "head and flip",
    } <= parts(phase)
    assert "the model marks" in phase.note and "engine of float32, " in found.title


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_of_a_model(device: str) -> None:
    found = bldm.profile(tiny_model().to(device).optimize("bf16"), num_samples=2, steps=3, repeats=1)
    sampling, decoding = found.phases
    check_sums(sampling)
    check_sums(decoding)
    assert {"embed", "block 0/mlp up", "block 0/mlp down", "head and flip"} <= parts(sampling) and len(parts(decoding)) > 5
    assert "engine of bf16, " in found.title


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_of_an_autoencoder(device: str) -> None:
    """It marks parts too, and has graphs of its own, which are used again afterwards."""
    model = tiny_model().to(device)
    engine = model.optimize("float32")
    engine.autoencoder = model.autoencoder.optimize("bf16")
    decoding = bldm.profile(engine, num_samples=2, steps=2, repeats=1).phases[1]
    check_sums(decoding)
    assert {"embed", "pixels"} <= parts(decoding) and "the model marks" in decoding.note
    assert engine.autoencoder.graph and engine.autoencoder.num_graphs == (device == "cuda")
    assert all(activity.part for activity in decoding.recording.activities if activity.in_graph)


@pytest.mark.parametrize("device", DEVICES)
def test_options_of_the_sampler(device: str) -> None:
    """bfloat16 products, in the decoder too: it takes copies into that precision."""
    model = tiny_model().to(device)
    plain, low = (bldm.profile(model, steps=2, repeats=1, **options) for options in ({}, {"autocast": torch.bfloat16}))
    assert ", autocast bfloat16, " in low.title and "autocast" not in plain.title
    before, after = (
        sum(event.get("name") == "aten::_to_copy" for event in found.phases[1].recording.events) for found in (plain, low)
    )
    assert after > before


# --- parts -------------------------------------------------------------------------------------------------------------
def test_parts_nest_only_while_recorded() -> None:
    def seen() -> list[str]:
        with torch.profiler.profile() as profiler:
            with part("a"), part("b"):
                torch.zeros(1)
            thread = threading.Thread(target=lambda: part("thread").__enter__())
            thread.start()
            thread.join()
        return [event.name for event in profiler.events() if event.name.startswith("bldm")]

    assert seen() == []
    with recording():
        with part("outer"):
            assert sorted(seen()) == ["bldm: outer/a", "bldm: outer/a/b"]
    assert seen() == [] and part("x") is part("y")


def test_compiled_code_knows_no_parts() -> None:
    denoiser = tiny_denoiser()
    x, t = torch.zeros(2, 4, 1, dtype=torch.uint8), torch.ones(2, dtype=torch.int64)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    with recording():
        assert torch.equal(compiled(x, t), denoiser(x, t))


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        self.fails = nn.Linear(3, 3)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fails(x) if fail else x


@pytest.mark.parametrize("depth", [1, 2])
def test_modules_as_parts(depth: int) -> None:
    tree = Tree()

    def entered() -> set[str]:
        with torch.profiler.profile() as profiler, recording():
            tree(torch.zeros(1, 2))
            with part("failing"), pytest.raises(RuntimeError):
                tree(torch.zeros(1, 2), fail=True)
            with part("after"):
                pass
        return {event.name.removeprefix("bldm: ") for event in profiler.events() if event.name.startswith("bldm: ")}

    with children_as_parts(tree, depth):
        names = entered()
    assert "failing/fails" in names and "after" in names
    assert "layers/Sequential 1" in names
    assert ("layers/Sequential 1/ReLU 1" in names) == (depth == 2)
    assert entered() == {"failing", "after"}


# --- reading traces ----------------------------------------------------------------------------------------------------
def event(name: str, cat: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": 1, "args": args}


def cuda_events(names: list[str], parts: list[str], graph: bool, gap: float = 1.0) -> list[dict[str, Any]]:
    """A call of kernels of 2 us, each launched in a part of its own, or all by one graph."""
    events = [event("bldm call", "user_annotation", 0, 1000)]
    if graph:
        events.append(event("cudaGraphLaunch", "cuda_runtime", 5, 1, correlation=1))
    for i, (name, path) in enumerate(zip(names, parts, strict=True)):
        if not graph:
            events.append(event("bldm: " + path, "cpu_op", 10 * i, 9))
            events.append(event("cudaLaunchKernel", "cuda_runtime", 10 * i + 2, 1, correlation=i + 1))
        events.append(event(name, "kernel", 100 + (2 + gap) * i, 2, correlation=1 if graph else i + 1))
    return events


def test_kernels_belong_to_the_part_that_launched_them() -> None:
    cuda = torch.device("cuda")
    found = read(cuda_events(["k", "l", "k"], ["step 0/a", "step 0/b", "step 1/a"], graph=False), cuda)
    assert [(a.name, a.part) for a in found.activities] == [("k", "step 0/a"), ("l", "step 0/b"), ("k", "step 1/a")]
    phase = make_phase("sampling", 0.9, found, "")
    rows = {row.part: (round(row.ms, 6), round(row.gap_ms, 6)) for row in phase.rows}
    assert rows["a"] == (0.004, 0.001) and rows["b"] == (0.002, 0.001) and rows["gaps"] == (0.002, 0)
    assert rows["host"] == (0.992, 0) and rows["profiler"] == (-0.1, 0)
    assert sum(row.ms for row in phase.rows) == pytest.approx(0.9)


def test_kernels_that_overlap_count_once() -> None:
    cuda = torch.device("cuda")
    found = read(cuda_events(["k", "l"], ["a", "b"], graph=False, gap=-1.5), cuda)
    rows = {row.part: round(row.ms, 6) for row in make_phase("decoding", 1.0, found, "").rows}
    assert rows == {"a": 0.002, "b": 0.0005, "gaps": 0, "host": 0.9975, "profiler": 0}


def test_kernels_of_a_graph_by_their_order() -> None:
    cuda, names = torch.device("cuda"), list("abcabdabc")
    paths = [f"step {i // 3}/{name}" for i, name in enumerate(names)]
    plain = read(cuda_events(names, paths, graph=False), cuda)
    other = [*names[:4], "clone", *names[4:]]
    graphed = read(cuda_events(other, [""] * len(other), graph=True), cuda)
    assert all(activity.in_graph and not activity.part for activity in graphed.activities)
    told, found = parts_by_order(graphed, plain)
    assert [activity.part for activity in told.activities] == [*paths[:4], paths[3], *paths[4:]]
    assert found == 0.9
    assert parts_by_order(read(cuda_events(list("xyz"), [""] * 3, graph=True), cuda), plain)[1] == 0


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        ("abc", "abc", [0, 1, 2]),
        ("", "abc", []),
        ("abc", "", [None, None, None]),
        ("abcdef", "abcxdef", [0, 1, 2, 4, 5, 6]),
        ("abcxdef", "abcdef", [0, 1, 2, None, 3, 4, 5]),
        ("abcxdef", "abcydef", [0, 1, 2, None, 4, 5, 6]),
        ("abcx", "abcd", [0, 1, 2, None]),
    ],
)
def test_aligned(names: str, known: str, expected: list[int | None]) -> None:
    assert aligned(list(names), list(known)) == expected


def test_innermost() -> None:
    ranges = [event(f"bldm: {name}", "cpu_op", start, stop - start) for name, start, stop in
              (("a", 0, 10), ("a/b", 2, 4), ("a/c", 4, 6), ("d", 20, 30))]  # fmt: skip
    assert innermost(ranges, [25, 1, 3, 5, 8, 15, 40]) == ["d", "a", "a/b", "a/c", "a", "", ""]
    assert innermost([], [1.0]) == [""]


# --- wrong arguments ---------------------------------------------------------------------------------------------------
def foreign() -> Any:
    return bldm.accelerate(bld.BinaryDiffusion())


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: bldm.profile(nn.Linear(2, 2)), TypeError, "target: expected a BinaryLatentDiffusion, .* got Linear"),
    (lambda: bldm.profile(bld.BinaryDiffusion(), call=print), TypeError, "target: .* got BinaryDiffusion"),
    (lambda: bldm.profile(foreign()), ValueError, "call: an accelerated object .* got None"),
    (lambda: bldm.profile(foreign(), call=3), TypeError, "call: expected a function of the target, got int"),
    (lambda: bldm.profile(foreign(), call=lambda fast: 3), ValueError, "call: it did not sample with its argument"),
    (lambda: bldm.profile(tiny_model(), call=print), ValueError, "call: a whole model is sampled .* expected None"),
    (lambda: bldm.profile(tiny_model(), num_samples=0), ValueError, "num_samples: expected 1 <="),
    (lambda: bldm.profile(tiny_model(), steps=99), ValueError, "steps: expected 1 <= steps <= 16, got 99"),
    (lambda: bldm.profile(tiny_model(), repeats=0), ValueError, "repeats: expected 1 <="),
    (lambda: bldm.profile(tiny_model(), depth=1.5), TypeError, "depth: expected an int"),
    (lambda: bldm.profile(tiny_model(None), guidance_scale=2.0), ValueError, "guidance_scale: 2.0 needs a condition"),
    (lambda: bldm.profile(tiny_model(), autocast=3), TypeError, "autocast: expected a floating dtype"),
    (lambda: bldm.profile(tiny_model().sampler(), rule="ddim"), ValueError, "rule: options of a model's sampler"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- the command -------------------------------------------------------------------------------------------------------
FEW = ("--steps", "2", "--repeats", "1", "--device", "cpu")
FACTORY = """
import torch
from standins import bld

def made(batch, steps, device):
    return bld.BinaryDiffusion().to(device), lambda fast: fast.sample(sample_steps=steps, b=batch)

def without_a_call(batch, steps, device):
    return bld.BinaryDiffusion().to(device)

def whole_model(batch, steps, device):
    from tiny_models import tiny_model
    return tiny_model().to(device)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "my_factory.py").write_text(FACTORY)
    return tmp_path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def test_command(folder: Path) -> None:
    result = run("--model", "model", *FEW, "--batch", 3, "--guidance", 2, "--each", "--png", "a/p.png", "--trace", "a/t.json")
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.output.splitlines()
    assert lines[0].startswith("BinaryLatentDiffusion: 3 samples, guidance 2, cpu")
    assert lines[-2:] == ["wrote a/p.png", "wrote a/t.json"]
    for text in ("block 0", "attention", "latency of a step", "decoding: "):
        assert text in result.output
    assert json.loads(Path("a/t.json").read_text())["traceEvents"] and Path("a/p.png").stat().st_size > 10_000


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_command_with_a_foreign_model(folder: Path, precision: str) -> None:
    result = run("--import", "my_factory:made", *FEW, "--batch", 3, "--precision", precision)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.startswith("BinaryDiffusion: ") and "logits" in result.output
    assert ("autocast bfloat16" in result.output) == (precision == "autocast")


def test_command_with_an_engine(folder: Path) -> None:
    result = run("--model", "model", *FEW, "--precision", "bf16")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "engine of bf16" in result.output and "head and flip" in result.output


def test_command_with_a_model_made_by_a_function(folder: Path) -> None:
    result = run("--import", "my_factory:whole_model", *FEW, "--batch", 3, "--guidance", 2)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.startswith("BinaryLatentDiffusion: 3 samples, guidance 2, ") and "decoding: " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "model: no folder nowhere"),
        (("--precision", "fp7"), "precision: 'fp7' is not one of float32"),
        (("--import", "my_factory"), "import: expected module:function, got 'my_factory'"),
        (("--import", "no_such_module:made"), "import: No module named 'no_such_module'"),
        (("--import", "my_factory:number"), "import: my_factory has no function number"),
        (("--import", "my_factory:without_a_call"), "call: an accelerated object"),
        (("--import", "my_factory:made", "--precision", "fp8"), "precision: only a BinaryLatentDiffusion has an engine of fp8"),
        (("--import", "my_factory:made", "--model", "model"), "model, import: expected one of them at most, got both"),
    ],
)
def test_command_with_wrong_arguments(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, *FEW)
    assert result.exit_code == 1 and f"error: {message}" in result.stderr.replace("\n", " ")
