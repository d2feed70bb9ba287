"""Training: it learns, an interrupted run ends exactly where an uninterrupted one does, and what it writes down."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.cli import app
from bldm.data import ImageData, load_images, to_float
from bldm.losses import DiffusionLoss
from bldm.training import denoiser as denoiser_training
from bldm.training import loop
from bldm.training.autoencoder import code_entropy, train_autoencoder
from bldm.training.denoiser import encode_images, train_denoiser
from bldm.training.loop import Batches, accelerator, train
from bldm.training.options import TrainOptions, learning_rate_factor
from test_data import write_idx
from torch import Tensor, nn
from typer.testing import CliRunner

import bldm_kernels as bk

# On a machine with a GPU too: bit for bit is a promise about the CPU, and the launched processes inherit this.
os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG: dict[str, Any] = {"image_size": 8, "num_bits": 8, "base_channels": 8, "channel_multipliers": (1, 1)}
DENOISER: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "dropout": 0.2}


def pictures(count: int = 16) -> ImageData:
    """Two classes: bars across and bars down."""
    rows = (torch.arange(8) + torch.arange(count)[:, None]) % 4 < 2
    across, down = rows[:, :, None].expand(-1, 8, 8), rows[:, None, :].expand(-1, 8, 8)
    label = torch.arange(count) // 4 % 2
    images = torch.where(label[:, None, None] == 0, across, down).to(torch.uint8) * 255
    return ImageData(images.unsqueeze(1).contiguous(), label, ["across", "down"])


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"steps": 20, "batch_size": 4, "save_every": 5, "warmup": 2, "ema_decay": 0.9, **changes})


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder(CONFIG, pictures(), options(steps=200, batch_size=16, lr=1e-2, warmup=10, save_every=200), out)
    return out


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- it learns -------------------------------------------------------------------------------------------------------
def test_autoencoder_overfits(autoencoder: Path) -> None:
    model = bldm.BinaryAutoencoder.from_pretrained(autoencoder)
    x = to_float(pictures().images)
    with torch.no_grad():
        error = (model.decode(model.encode(x)) - x).abs().mean()
    assert error < 0.15  # the mean picture is 1.0 away
    summary = json.loads((autoencoder / "train.json").read_text())
    assert summary["final_losses"]["l1"] < 0.2 and set(summary["final_losses"]) == {"loss", "l1", "mse", "code_entropy"}


@pytest.mark.parametrize(("prediction", "far"), [("x_0", 0.15), ("flip", 0.4)])  # a flip is an exclusive or: it takes longer
def test_denoiser_overfits_and_paints_what_it_is_told(prediction: str, far: float, autoencoder: Path, tmp_path: Path) -> None:
    config = {**DENOISER, "width": 32, "depth": 2, "dropout": 0.0}
    training = options(steps=400, batch_size=64, lr=1.5e-2, warmup=20, save_every=400)
    data = pictures(64)
    model = train_denoiser(autoencoder, config, data, training, tmp_path, num_steps=16, prediction=prediction)
    known = encode_images(model.autoencoder, data.images, flip=False)
    labels = torch.arange(2).repeat(32)
    latents = model.sampler().sample(64, 16, cond=labels, guidance_scale=2.0)
    distances, nearest = bk.hamming_topk(latents, known, 1)
    assert data.labels is not None
    assert (data.labels[nearest[:, 0]] == labels).float().mean() > 0.9
    assert distances.float().mean() < far * 16 * 8
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(tmp_path)
    assert equal(loaded, model) and loaded.class_names == ["across", "down"] and loaded.schedule == model.schedule
    assert torch.equal(loaded.sampler().sample(2, 4, cond=1), model.sampler().sample(2, 4, cond=1))


# --- resuming --------------------------------------------------------------------------------------------------------
class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The run dies at this step, on its way to the data."""

    def at(last: int) -> None:
        call = Batches.__call__

        def die(self: Batches, step: int) -> Tensor:
            if step == last:
                monkeypatch.setattr(Batches, "__call__", call)
                raise Interrupted
            return call(self, step)

        monkeypatch.setattr(Batches, "__call__", die)

    return at


def run_autoencoder(out: Path, source: Path, **changes: Any) -> nn.Module:
    return train_autoencoder(CONFIG, pictures(), options(**changes), out, flip=True, entropy_weight=0.1)


def run_denoiser(out: Path, source: Path, **changes: Any) -> nn.Module:
    loss = {"form": "focal", "posterior_kl": 0.1, "weighting": "weighted"}
    training = options(**changes)
    return train_denoiser(source, DENOISER, pictures(), training, out, num_steps=16, flip=True, label_dropout=0.5, loss=loss)


@pytest.mark.parametrize("run", [run_autoencoder, run_denoiser])
def test_resumed_run_is_the_uninterrupted_run(
    run: Callable[..., nn.Module], autoencoder: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    whole = run(tmp_path / "whole", autoencoder)
    interrupt(13)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", autoencoder)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    torch.manual_seed(12345)  # the state a new process finds is another one
    resumed = run(tmp_path / "parts", autoencoder, resume=True)
    assert equal(whole, resumed)
    states = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    assert states[0]["step"] == states[1]["step"] == 20
    for one, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_a_finished_run_changes_nothing(autoencoder: Path, tmp_path: Path) -> None:
    first = run_denoiser(tmp_path, autoencoder)
    again = run_denoiser(tmp_path, autoencoder, resume=True)
    assert equal(first, again)
    assert json.loads((tmp_path / "train.json").read_text())["steps_done"] == 20


def test_resume_without_a_checkpoint_starts_anew(autoencoder: Path, tmp_path: Path) -> None:
    assert equal(run_denoiser(tmp_path / "a", autoencoder), run_denoiser(tmp_path / "b", autoencoder, resume=True))


@pytest.mark.parametrize("damage", ["other model", "half a file", "text"])
def test_resume_names_a_checkpoint_that_does_not_fit(damage: str, autoencoder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run_denoiser(tmp_path, autoencoder, steps=1)
    if damage == "other model":
        run_autoencoder(tmp_path, autoencoder, steps=1)
    elif damage == "half a file":
        checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    else:
        checkpoint.write_text("hello")
    with pytest.raises(ValueError, match="resume: .*checkpoint.pt is not a checkpoint of this model"):
        run_denoiser(tmp_path, autoencoder, resume=True)


def test_a_save_that_fails_leaves_the_checkpoint_before(
    autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_denoiser(tmp_path / "whole", autoencoder)
    out, save = tmp_path / "parts", torch.save

    def fill_the_disk(state: dict[str, Any], name: str) -> None:
        save(state, name)
        if state["step"] > 5:
            os.truncate(name, os.path.getsize(name) // 2)
            raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        run_denoiser(out, autoencoder)
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    assert torch.load(out / "checkpoint.pt")["step"] == 5
    assert equal(whole, run_denoiser(out, autoencoder, resume=True))


def test_a_run_stopped_by_the_clock_goes_on(autoencoder: Path, tmp_path: Path) -> None:
    whole = run_denoiser(tmp_path / "whole", autoencoder)
    stopped = run_denoiser(tmp_path / "parts", autoencoder, max_minutes=1e-6)
    assert json.loads((tmp_path / "parts" / "train.json").read_text())["steps_done"] == 10
    assert equal(stopped, bldm.BinaryLatentDiffusion.from_pretrained(tmp_path / "parts"))  # what there is by then is saved
    assert not equal(whole, stopped)
    assert equal(whole, run_denoiser(tmp_path / "parts", autoencoder, resume=True))


# --- the loop --------------------------------------------------------------------------------------------------------
def fit(out: Path, objective: Callable[..., dict[str, Tensor]] | None = None, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Train the weight of a 1 x 1 linear layer towards 3; returns (the model, the average)."""
    model = nn.Linear(1, 1, bias=False)

    def towards_three(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": (trained(torch.ones(len(rows), 1)) - 3).square().mean()}

    training = options(**changes)
    return model, train(model, objective or towards_three, 8, training, out, accelerator(), {"note": "a test"})


def test_loop_descends_averages_and_reports(tmp_path: Path) -> None:
    model, average = fit(tmp_path, steps=400, lr=0.1, weight_decay=0.0, log_dir=str(tmp_path / "logs"))
    assert isinstance(model, nn.Linear) and isinstance(average, nn.Linear) and not average.training
    assert abs(model.weight.item() - 3) < 0.05 and abs(average.weight.item() - 3) < 0.05
    assert average.weight is not model.weight
    summary = json.loads((tmp_path / "train.json").read_text())
    assert summary["steps_done"] == 400 and summary["note"] == "a test" and summary["options"]["lr"] == 0.1
    assert summary["final_losses"]["loss"] < 0.01 and summary["torch"] == torch.__version__ and summary["command"][:4] == "bldm"
    assert any((tmp_path / "logs").iterdir())
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_average_of_a_short_run_has_left_the_beginning(tmp_path: Path) -> None:
    """With a decay of 0.999 from the first step on, 40 steps would leave the average at the random start."""
    torch.manual_seed(0)
    model, average = fit(tmp_path, steps=40, lr=0.3, ema_decay=0.999)
    assert isinstance(model, nn.Linear) and isinstance(average, nn.Linear)
    assert abs(average.weight.item() - model.weight.item()) < 1


def test_max_minutes_stops_with_a_checkpoint_and_time_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 3))  # three seconds a look
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    fit(tmp_path, steps=100, max_minutes=0.6)
    first = json.loads((tmp_path / "train.json").read_text())
    assert first["steps_done"] == 20 and 1 <= first["minutes"] < 1.2
    fit(tmp_path, steps=100, max_minutes=0.6, resume=True)
    second = json.loads((tmp_path / "train.json").read_text())
    assert second["steps_done"] == 40 and abs(second["minutes"] - 2 * first["minutes"]) < 0.15


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    def explode(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": trained(torch.ones(1, 1)).sum() * (float("nan") if step > 3 else 1.0)}

    with pytest.raises(FloatingPointError, match="loss: nan at or before step 49"):
        fit(tmp_path, explode, steps=100, save_every=100)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    def explode(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": trained(torch.ones(1, 1)).sum() * (float("nan") if step == 11 else 1.0)}

    with pytest.raises(FloatingPointError, match="loss: nan at or before step 14"):
        fit(tmp_path, explode, steps=100, save_every=5)
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 10 and bool(state["model"]["weight"].isfinite())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_labels_left_out(share: float, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Watched(DiffusionLoss):
        def __call__(self, *args: Any, label: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
            assert label is not None
            seen.append(label)
            return super().__call__(*args, label=label, **kwargs)

    monkeypatch.setattr(denoiser_training, "DiffusionLoss", Watched)
    training = options(batch_size=64)
    train_denoiser(autoencoder, DENOISER, pictures(64), training, tmp_path, num_steps=16, label_dropout=share)
    labels = torch.cat(seen)
    assert labels.shape == (20 * 64,) and set(labels.tolist()) <= {0, 1, 2}
    assert abs(float((labels == 2).float().mean()) - share) <= 4 * (share * (1 - share) / len(labels)) ** 0.5


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import bldm, torch
from bldm.training import loop
from bldm.training.denoiser import train_denoiser
from test_training import DENOISER, options, pictures

rank, out, save = int(os.environ["RANK"]), Path(sys.argv[2]), loop._save
rows, call = [], loop.Batches.__call__
torch.set_num_threads(1)
torch.manual_seed(100 + rank)

def watched(self, step):
    rows.append(call(self, step))
    return rows[-1]

def saved(path, state):
    save(path, state)
    print("saved by", rank, "at", state["step"], flush=True)

loop.Batches.__call__, loop._save = watched, saved
# Seven latents for two times four: one process has less to do. And the clock stops only one of them by itself.
late = options(max_minutes=1e-6 if rank else 100.0, save_every=100)
model = train_denoiser(Path(sys.argv[1]), DENOISER, pictures(7), late, out, num_steps=16)
torch.save({"model": model.state_dict(), "rows": rows}, out / f"rank{rank}.pt")
"""


def test_two_processes_train_one_model(autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py"]
    done = subprocess.run(
        [*command, str(autoencoder), str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("saved")] == ["saved by 0 at 10"]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert len(one["rows"]) == len(other["rows"]) == 10
    assert bldm.BinaryLatentDiffusion.from_pretrained(tmp_path).denoiser.num_classes == 2
    assert json.loads((tmp_path / "train.json").read_text())["processes"] == 2


def test_mixed_precision_and_compile(autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_denoiser(tmp_path / "plain", autoencoder, steps=6)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    fast = run_denoiser(tmp_path / "fast", autoencoder, steps=6, mixed_precision="bf16", compile=True)
    one, other = weights(plain), weights(fast)
    assert all(torch.allclose(one[name], other[name], atol=0.02) for name in one)
    run_autoencoder(tmp_path / "autoencoder", autoencoder, steps=4, mixed_precision="bf16", compile=True)


def test_batches_are_epochs_of_permutations() -> None:
    batches = Batches(10, 3, seed=1)
    epochs = [torch.cat([batches(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert torch.equal(Batches(10, 3, seed=1)(7), batches(7)) and not torch.equal(Batches(10, 3, seed=2)(7), batches(7))
    assert sorted(Batches(5, 100, seed=0)(3).tolist()) == list(range(5))


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, 10, 1000) for step in range(1001)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and abs(factors[1000] - 0.01) < 1e-9
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert learning_rate_factor(0, 200, 20) == 0.5  # a short run does not end in its warm-up


def test_code_entropy() -> None:
    assert abs(float(code_entropy(torch.zeros(2, 3, 4, 4))) - 1) < 1e-6
    assert float(code_entropy(torch.full((2, 3, 4, 4), 40.0))) < 1e-4
    used = torch.cat([torch.full((1, 3, 4, 4), 40.0), torch.full((1, 3, 4, 4), -40.0)])
    assert abs(float(code_entropy(used)) - 1) < 1e-4  # every bit is certain, and half of them are set


def test_encode_images_adds_the_mirror_images(autoencoder: Path) -> None:
    model = bldm.BinaryAutoencoder.from_pretrained(autoencoder)
    images = pictures(6).images
    latents = encode_images(model, images, flip=True, batch_size=4)
    assert torch.equal(latents[:6], model.encode(to_float(images)))
    assert torch.equal(latents[6:], model.encode(to_float(images.flip(-1))))


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected 1 <= steps .*, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size: expected an int, got float"),
        ({"save_every": -1}, ValueError, "save_every: expected 1 <= save_every .*, got -1"),
        ({"lr": 0.0}, ValueError, "lr: expected > 0, got 0.0"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay: expected 0 <= ema_decay < 1, got 1.0"),
        ({"max_minutes": 0.0}, ValueError, "max_minutes: expected > 0, got 0.0"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision: expected one of 'no', 'bf16', got 'fp8'"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        options(**changes)


def test_label_dropout_is_checked(autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_dropout: expected 0 <= label_dropout <= 1, got 1.5"):
        train_denoiser(autoencoder, DENOISER, pictures(), options(), tmp_path, label_dropout=1.5)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RuntimeError, match=r"pip install 'bldm-kernels\[train\]'"):
        accelerator()


# --- the two commands ------------------------------------------------------------------------------------------------
def cli(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_train_a_model_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures(20)
    monkeypatch.setattr("test_data.IMAGES", data.images[:, 0].numpy())
    folder = write_idx(tmp_path / "fashion-mnist", labels=torch.arange(20).remainder(10).byte().numpy())
    shared = ("--steps", 4, "--batch-size", 4, "--flip", "--seed", 3)
    a, d = tmp_path / "a", tmp_path / "d"
    output = cli("train-autoencoder", folder, "--out", a, "--bits", 8, "--base-channels", 8, "--multipliers", "1,1", *shared)
    assert "autoencoder with" in output and "latents of (4, 4, 8) bits" in output
    sizes = ("--width", 16, "--depth", 1, "--heads", 2, "--num-steps", 16)
    output = cli("train", folder, "--autoencoder", a, "--out", d, *sizes, *shared, "--max-train-samples", 5)
    assert "denoiser with" in output and "bldm sample --model" in output
    model = bldm.BinaryLatentDiffusion.from_pretrained(d)
    assert model.class_names == load_images(folder).class_names  # all ten, though five images hold fewer classes
    assert model.denoiser.num_classes == 10 and model.schedule.num_steps == 16
    assert equal(model.autoencoder, bldm.BinaryAutoencoder.from_pretrained(a))
    cli("sample", "--model", d, "--out", tmp_path / "s.png", "--steps", 4)
    assert json.loads((d / "train.json").read_text())["data"] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train-autoencoder", "{nothing}"), "data: no file or folder"),
        (
            ("train-autoencoder", "{data}", "--multipliers", "1,x"),
            "multipliers: expected integers separated by commas",
        ),
        (("train-autoencoder", "{data}"), "data: expected square images, got (6, 5)"),
        (("train-autoencoder", "{data}", "--max-train-samples", "0"), "max_train_samples: expected 1 <= max_train_samples"),
        (("train", "{data}", "--autoencoder", "{nothing}"), "model: no folder"),
    ],
)
def test_commands_say_in_one_line_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    places = {"nothing": tmp_path / "nothing", "data": write_idx(tmp_path / "data")}
    result = CliRunner().invoke(app, [a.format(**places) for a in arguments] + ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
