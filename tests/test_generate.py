"""Folders of many samples: split over processes, resumed, whole or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bldm
import numpy as np
import pytest
import torch
from bldm.cli import app
from bldm.generate import SETTINGS, SampleFolder, Share, load_latents
from bldm.grid import to_uint8
from PIL import Image
from tiny_models import tiny_model
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")
TEN = ("--num-samples", "10", "--steps", "3", "--device", "cpu", "--batch-size", "4", "--seed", "5")
PIECES = ["latents-000000.safetensors", "latents-000004.safetensors", "latents-000008.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def invoke(model: Path, out: Path, *options: object) -> str:
    result = CliRunner().invoke(app, ["sample", "--model", str(model), *TEN, "--out", str(out), *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.output


def fail(model: Path, out: Path, *options: object) -> str:
    result = CliRunner().invoke(app, ["sample", "--model", str(model), *TEN, "--out", str(out), *map(str, options)])
    assert result.exit_code == 1 and "Traceback" not in result.output
    return " ".join(result.stderr.split())


def expected(model: Path) -> torch.Tensor:
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    labels = torch.tensor([i * 3 // 10 for i in range(10)])
    return loaded.sampler().sample(10, 3, seed=5, cond=labels, guidance_scale=2.0)


def test_packed_latents_are_what_the_library_samples(model: Path, tmp_path: Path) -> None:
    output = invoke(model, tmp_path / "out", "--packed")
    assert "10 samples in" in output and "process" not in output
    assert sorted(os.listdir(tmp_path / "out")) == [*PIECES, SETTINGS]
    assert torch.equal(load_latents(tmp_path / "out").packed, expected(model))


def test_images_are_the_decoded_latents(model: Path, tmp_path: Path) -> None:
    invoke(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"{i:06}.png" for i in range(10)), SETTINGS]
    images = to_uint8(bldm.BinaryLatentDiffusion.from_pretrained(model).decode(expected(model)))
    for i in range(10):
        with Image.open(tmp_path / "out" / f"{i:06}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[i, 0].numpy())


def test_two_processes_fill_the_folder_of_one(model: Path, tmp_path: Path) -> None:
    invoke(model, tmp_path / "one", "--packed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bldm", "sample"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    options = ["--model", str(model), *TEN, "--out", str(tmp_path / "two"), "--packed"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 samples by process 0 of 2" in done.stdout and "4 samples by process 1 of 2" in done.stdout
    for name in PIECES:  # the order of a file's metadata differs from run to run
        assert bldm.PackedLatents.load(tmp_path / "one" / name) == bldm.PackedLatents.load(tmp_path / "two" / name)
    assert (tmp_path / "one" / SETTINGS).read_bytes() == (tmp_path / "two" / SETTINGS).read_bytes()


def contents(folder: Path) -> dict[str, object]:
    """What the files of a folder hold: bytes, or latents."""
    return {p.name: bldm.PackedLatents.load(p) if p.suffix == ".safetensors" else p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_missing_is_made_and_nothing_else(packed: bool, model: Path, tmp_path: Path) -> None:
    options = ("--packed",) if packed else ()
    invoke(model, tmp_path, *options)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    first = contents(tmp_path)
    lost = PIECES[1] if packed else "000005.png"
    (tmp_path / lost).unlink()
    assert "4 samples in" in invoke(model, tmp_path, *options)
    assert contents(tmp_path) == first
    again = PIECES[1:2] if packed else [f"{i:06}.png" for i in range(4, 8)]
    changed = [name for name, time in before.items() if (tmp_path / name).stat().st_mtime_ns != time]
    assert sorted(changed) == again
    assert "0 samples in" in invoke(model, tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", 6), "seed: {out} was begun with 5, got 6"),
        (("--steps", 4), "steps: {out} was begun with 3, got 4"),
        (("--num-samples", 11), "conditions: {out} was begun with"),
        (("--batch-size", 5), "piece: {out} was begun with 4, got 5"),
        (("--guidance", 3), "guidance_scale: {out} was begun with 2.0, got 3.0"),
        (("--label", "0"), "conditions: {out} was begun with"),
        ((), "packed: {out} was begun with True, got False"),
    ],
)
def test_a_folder_of_other_samples_is_an_error(options: tuple[object, ...], message: str, model: Path, tmp_path: Path) -> None:
    invoke(model, tmp_path, "--packed")
    assert message.format(out=tmp_path) in fail(model, tmp_path, *options, *(("--packed",) if options else ()))


def test_another_model_is_an_error(model: Path, tmp_path: Path) -> None:
    invoke(model, tmp_path / "out")
    other = bldm.BinaryLatentDiffusion.from_pretrained(model)
    with torch.no_grad():
        other.denoiser.head.bias += 1
    other.save_pretrained(tmp_path / "other")
    assert "model: " in fail(tmp_path / "other", tmp_path / "out")


def test_places_that_do_not_fit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert f"out: expected a folder, {tmp_path}/file is a file" in fail(model, tmp_path / "file")
    assert "out: expected a .png or a folder" in fail(model, tmp_path / "samples.jpg")
    assert "out: packed latents go into a folder" in fail(model, tmp_path / "samples.png", "--packed")
    assert "latents: a folder of samples has either" in fail(model, tmp_path / "out", "--latents", tmp_path / "latents")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "out: several processes write into a folder" in fail(model, tmp_path / "samples.png")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_make_up_the_whole(processes: int, tmp_path: Path) -> None:
    shares = [SampleFolder(tmp_path, 103, 10, {}, share=Share(rank, processes)).missing() for rank in range(processes)]
    samples = [i for share in shares for first, count in share for i in range(first, first + count)]
    assert sorted(samples) == list(range(103)) and all(first % 10 == 0 for share in shares for first, _ in share)


def test_a_damaged_record_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("{")
    assert f"out: {tmp_path}/{SETTINGS} is not valid JSON" in fail(model, tmp_path)


def test_loading_half_a_folder_says_so(model: Path, tmp_path: Path) -> None:
    invoke(model, tmp_path, "--packed")
    (tmp_path / PIECES[0]).unlink()
    with pytest.raises(ValueError, match="is no whole folder of latents: 1 of its pieces are missing"):
        load_latents(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "packed": False}))
    with pytest.raises(ValueError, match="it holds images"):
        load_latents(tmp_path)
