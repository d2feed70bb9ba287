"""Training on a GPU, in processes of their own: the other tests of training keep to the CPU, where results are exact."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bldm
import numpy as np
import torch
from conftest import require_gpu

ROOT = Path(__file__).resolve().parent.parent


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
