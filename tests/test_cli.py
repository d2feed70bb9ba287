"""The commands, as a user types them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import bldm
import numpy as np
import pytest
import torch
from bldm.cli import app
from PIL import Image
from tiny_models import tiny_denoiser, tiny_model
from typer.testing import CliRunner

import bldm_kernels as bk
from bldm_kernels import doctor

COMMANDS = ("sample", "reconstruct", "encode", "nearest", "train-autoencoder", "train", "convert", "bench", "profile", "doctor")
FEW = ("--num-samples", "6", "--steps", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: object) -> str:
    """What a successful command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def fail(*arguments: object) -> str:
    """The one line a command ends with when an argument is wrong."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and "Traceback" not in result.output
    return line


# --- sample -----------------------------------------------------------------------------------------------------------
def test_sample(model: Path) -> None:
    output = invoke("sample", "--model", model, *FEW)
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(r"samples\.png: 6 samples in \d+\.\d s \(\d+\.\d a second, 3 steps, cpu\)", last)
    with Image.open("samples.png") as picture:
        assert picture.format == "PNG" and picture.size == (3 * (84 + 6) + 6, 2 * (84 + 6 + 16) + 6)
    assert [path.name for path in Path().iterdir()] == ["samples.png"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_sample_with_an_engine(model: Path, precision: str) -> None:
    invoke("sample", "--model", model, *FEW, "--precision", precision, "--guidance", "1", "--latents", "few.safetensors")
    engine = bldm.BinaryLatentDiffusion.from_pretrained(model).optimize(precision)
    expected = engine.sampler().sample(6, 3, cond=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert bldm.PackedLatents.load("few.safetensors") == bldm.PackedLatents(expected, engine.latent_shape)
    assert "precision" in fail("sample", "--model", model, *FEW, "--precision", "int8")


def test_sample_is_what_the_library_samples(model: Path) -> None:
    """Options mean what they say, and the latents are the sampler's, whatever the batches."""
    options = ("--seed", 7, "--temperature", 0.9, "--rule", "marginal", "--guidance", 1.5, "--batch-size", 4)
    invoke("sample", "--model", model, *FEW, *options, "--latents", "out/latents", "--out", "out/grid.png")
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = loaded.sampler(rule="marginal").sample(6, 3, seed=7, temperature=0.9, cond=labels, guidance_scale=1.5)
    latents = bldm.PackedLatents.load("out/latents")
    assert latents == bldm.PackedLatents(expected, loaded.latent_shape)
    assert sorted(path.name for path in Path("out").iterdir()) == ["grid.png", "latents"]


def latents_of(model: Path, *options: object) -> bldm.PackedLatents:
    invoke("sample", "--model", model, *FEW, *options, "--latents", "latents")
    return bldm.PackedLatents.load("latents")


def test_labels_by_name_and_by_index(model: Path) -> None:
    by_name = latents_of(model, "--label", "ankle BOOT")
    assert latents_of(model, "--label", 1) == by_name
    assert latents_of(model, "--label", 0) != by_name
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    two = loaded.sampler().sample(6, 3, cond=torch.tensor([2, 2, 2, 0, 0, 0]), guidance_scale=2.0)
    assert torch.equal(latents_of(model, "--label", "bag", "--label", "0").packed, two)


def test_the_seed_decides(model: Path) -> None:
    assert latents_of(model, "--seed", 5) == latents_of(model, "--seed", 5, "--batch-size", 1)
    assert latents_of(model, "--seed", 5) != latents_of(model, "--seed", 6)


def test_a_model_without_classes(tmp_path: Path) -> None:
    tiny_model(num_classes=None).save_pretrained(tmp_path / "plain")
    invoke("sample", "--model", "plain", *FEW)
    assert Path("samples.png").is_file()
    assert "label: this model has no classes" in fail("sample", "--model", "plain", *FEW, "--label", "Bag")


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--label", "Sandal"), "label: 'Sandal' is not a class of this model; expected one of shirt, ankle boot, bag, 0, 1, 2"),
        (("--label", "3"), "label: '3' is not a class"),
        (("--steps", "17"), "steps: expected 1 <= steps <= 16, got 17"),
        (("--steps", "0"), "steps: expected 1 <= steps <= 16, got 0"),
        (("--temperature", "0"), "temperature: expected > 0, got 0.0"),
        (("--guidance", "nan"), "guidance_scale: expected a finite number, got nan"),
        (("--rule", "posterior"), "rule: expected one of 'plugin', 'marginal', .*, got 'posterior'"),
        (("--seed", str(2**64)), "seed: expected .*, got 18446744073709551616"),
        (("--device", "abacus"), "abacus"),
        (("--model", "nowhere"), "model: no folder nowhere"),
        (("--model", "[/strange] name"), r"model: no folder \[/strange\] name"),
        (("--out", "/dev/null/grid.png"), "/dev/null"),
    ],
)
def test_wrong_options_are_one_line(model: Path, options: tuple[str, ...], expected: str) -> None:
    assert re.search(expected, fail("sample", "--model", model, *FEW, *options))
    assert not Path("samples.png").exists()


@pytest.mark.parametrize("options", [("--num-samples", "0"), ("--batch-size", "0"), ("--num-samples", "many"), ("--colour",)])
def test_options_that_cannot_be_read(options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["sample", *options])
    assert result.exit_code == 2 and options[0] in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(model: Path) -> None:
    assert "device: cuda asked for, but no GPU is visible" in fail("sample", "--model", model, "--device", "cuda")


def test_paths_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save({}, "model.th")
    assert "expected a folder with config.json and model.safetensors, got a pickle" in fail("sample", "--model", "model.th")
    Path("empty").mkdir()
    assert "model: empty has no config.json" in fail("sample", "--model", "empty")
    assert "nobody/nothing" in fail("sample", "--model", "nobody/nothing")
    tiny_denoiser().save_pretrained(tmp_path / "denoiser")
    assert "is not the configuration of a BinaryLatentDiffusion" in fail("sample", "--model", "denoiser")
    tiny_model().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cut/model.safetensors is truncated" in fail("sample", "--model", "cut")


def test_the_bundled_model() -> None:
    """With no arguments but the size: the model that ships with the package, all its classes in order."""
    assert (bldm.bundled_model() / "README.md").is_file(), "the model card"
    assert sum(path.stat().st_size for path in bldm.bundled_model().iterdir()) <= 12 * 2**20
    invoke("sample", "--num-samples", 20, "--steps", 4, "--device", "cpu", "--latents", "latents")
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(bldm.bundled_model())
    assert len(loaded.class_names or []) == 10
    latents = bldm.PackedLatents.load("latents")
    assert len(latents) == 20 and latents.shape == loaded.latent_shape
    assert len({bytes(x.packed.flatten().tolist()) for x in latents}) == 20
    with Image.open("samples.png") as picture:
        assert np.asarray(picture).std() > 20, "something is in the picture"


# --- reconstruct ------------------------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 training and 5 test images of three classes, as an NPZ file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("test", 5)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def test_reconstruct(model: Path, data: Path) -> None:
    output = invoke("reconstruct", data, "--model", model, "-n", 4, "--device", "cpu", "--out", "new/pairs.png")
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    size = int(np.prod(loaded.latent_shape)) // 8
    line = output.strip().splitlines()[-1]
    found = re.fullmatch(rf"new/pairs\.png: 4 images, {size} bytes each, mean absolute error (0\.\d+) of the range", line)
    assert found
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["test_images"][:4]).unsqueeze(1).float() / 127.5 - 1
    error = (loaded.decode(loaded.encode(images)) - images).abs().mean().item() / 2
    assert float(found[1]) == pytest.approx(error, abs=1e-3)
    with Image.open("new/pairs.png") as picture:
        assert picture.size == (8 * 90 + 6, 106 + 6)


def test_reconstruct_data_that_is_not_there(model: Path) -> None:
    assert "nowhere.npz" in fail("reconstruct", "nowhere.npz", "--model", model)
    Path("text.npz").write_text("not an archive")
    assert "text.npz" in fail("reconstruct", "text.npz", "--model", model)


# --- doctor, help, the real thing -------------------------------------------------------------------------------------
def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bldm.cli.doctor.console.width", 10_000, raising=False)
    monkeypatch.setitem(bk.dispatch._registry, "cuda", bk.Backend("cuda", ("cuda",), "nvcc [not found] on this machine"))
    output = invoke("doctor")
    for heading in ("python", "torch", "triton", "bldm-kernels", "used on cpu", "bundled model"):
        assert heading in output
    for backend in bk.backends():
        assert f"backend {backend}" in output
    assert "unavailable: nvcc [not found] on this machine" in output


def test_doctor_without_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m bldm_kernels` says the same."""
    doctor.main()
    printed = capsys.readouterr().out
    assert all(f"{heading:<16} {text}" in printed for heading, text in doctor.report())


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    assert command in invoke("--help")
    assert "Usage" in invoke(command, "--help")


def test_no_command_shows_the_help() -> None:
    assert all(command in CliRunner().invoke(app, []).output for command in COMMANDS)


def test_a_real_process(model: Path) -> None:
    """Exit code, stdout and stderr as a shell sees them."""
    command = [sys.executable, "-c", "from bldm.cli import app; app()", "sample", "--model", str(model), *FEW]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip().splitlines()[-1].startswith("samples.png: 6 samples in ")
    assert Path("samples.png").is_file()
