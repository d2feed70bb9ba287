"""Training on a GPU, in processes of their own: the other tests of training keep to the CPU, where results are exact."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.denoiser import BinaryDenoiser
from bldm.training.graph import WARM_UP, Graphed
from conftest import require_gpu
from torch import Tensor, nn

import bldm_kernels as bk

ROOT = Path(__file__).resolve().parent.parent
WORDS = {"text_width": 8, "cross_attention": True}


def test_both_halves_are_trained_resumed_and_painted_with(tmp_path: Path) -> None:
    require_gpu()
    rows = (np.arange(64)[:, None, None] + np.arange(16)[None, :, None]) % 8 < 4
    images = (255 * np.broadcast_to(rows, (64, 16, 16))).astype(np.uint8)
    labels = np.arange(64) % 2
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | {"PYTHONPATH": paths}

    def run(*command: object) -> str:
        line = [sys.executable, "-m", "bldm", *map(str, command)]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    size = ("--bits", 8, "--base-channels", 8, "--multipliers", "1,2,2")
    run("train-autoencoder", "data.npz", "--out", "ae", *size, "--steps", 60, "--batch-size", 32)
    size = ("--width", 64, "--depth", 2, "--heads", 2)
    denoiser = ("train", "data.npz", "--autoencoder", "ae", "--out", "model", *size, "--batch-size", 32, "--lr", 3e-3)
    run(*denoiser, "--steps", 30)
    first = json.loads((tmp_path / "model" / "train.json").read_text())
    run(*denoiser, "--steps", 300, "--resume")
    trained = json.loads((tmp_path / "model" / "train.json").read_text())
    assert first["machine"] == trained["machine"] == torch.cuda.get_device_name()
    assert trained["options"]["mixed_precision"] == "bf16" and trained["steps_done"] == 300
    assert trained["final_losses"]["loss"] < 0.8 * first["final_losses"]["loss"]
    run("sample", "--model", "model", "-n", 4, "--out", "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 0
    model = bldm.BinaryLatentDiffusion.from_pretrained(tmp_path / "model", map_location="cuda")
    assert model.sample(4, steps=4, labels=1).isfinite().all()


@pytest.mark.parametrize(
    "size", [{}, {"num_classes": 3}, {"num_classes": 3, "null_class": False}, {"text_width": 8}] + [WORDS], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_graph_computes_what_the_model_does(size: dict[str, Any], dropout: float) -> None:
    """Also of weights that have changed since, with the dropout of the seed; other shapes run as they are."""
    require_gpu()
    torch.manual_seed(0)
    model = BinaryDenoiser(16, 8, width=64, depth=2, num_heads=2, dropout=dropout, **size).cuda().train()
    nn.init.normal_(model.head.weight)
    graphed, parameters = Graphed(model), list(model.parameters())

    def gradients(module: nn.Module, seed: int, samples: int = 6) -> list[Tensor | None]:
        torch.manual_seed(seed)
        x_t, t = bk.random_bits(samples, (16, 8), seed=seed, device="cuda"), torch.randint(1, 257, (samples,), device="cuda")
        label: tuple[Tensor, ...] = ()
        if "num_classes" in size:
            label = (torch.randint(0, 4, (samples,), device="cuda"),)
        elif size:
            shape = (samples, 5, 8) if "cross_attention" in size else (samples, 8)
            label = (
                torch.randn(shape, device="cuda") * (torch.rand(samples, device="cuda") < 0.5).view(-1, *[1] * (len(shape) - 1)),
            )
        torch.manual_seed(seed)
        return list(torch.autograd.grad(module(x_t, t, *label).square().mean(), parameters, allow_unused=True))

    for seed in range(WARM_UP + 4):
        for got, wanted in zip(gradients(graphed, seed), gradients(model, seed), strict=True):
            assert got is None and wanted is None or torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.01)
    assert graphed._replay is not None
    for got, wanted in zip(gradients(graphed, 0, 4), gradients(model, 0, 4), strict=True):
        assert got is None and wanted is None or torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
