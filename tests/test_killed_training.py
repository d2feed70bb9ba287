"""Training killed with SIGKILL at random moments: no checkpoint is lost or torn, and the end is that of an uninterrupted run."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from bldm.training.autoencoder import train_autoencoder
from test_training import CONFIG, options, pictures

KILLS = 20
# One process imports everything once; the runs are its forked children, so that a kill hits training, not imports.
JOB = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from bldm.training import denoiser
from test_training import DENOISER, options, pictures
torch.set_num_threads(1)

source, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
STEPS = 90

class Recorded(denoiser.DiffusionLoss):
    def __call__(self, *args, step, **kwargs):
        losses = super().__call__(*args, step=step, **kwargs)
        line = f"{step} {losses['loss'].item().hex()}\\n".encode()
        os.write(curve, line)  # one write: whole or absent
        return losses

denoiser.DiffusionLoss = Recorded

def run(name, resume):
    global curve
    curve = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    training = options(steps=STEPS, save_every=1, resume=resume, mixed_precision="bf16")
    denoiser.train_denoiser(source, DENOISER, pictures(), training, folder / name, num_steps=16, label_dropout=0.5)

def child(name, resume):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(name, resume)
            code = 0
        finally:
            os._exit(code)
    return pid

began = time.perf_counter()
assert os.waitpid(child("whole", False), 0)[1] == 0
whole = time.perf_counter() - began
moments, checkpoint, last, steps = random.Random(0), folder / "killed" / "checkpoint.pt", 0, []
killed = 0
while killed < kills:
    pid = child("killed", True)
    time.sleep(whole * moments.uniform(0.02, 0.25))
    os.kill(pid, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        killed += 1
    if checkpoint.exists():
        step = torch.load(checkpoint)["step"]
        assert step >= last, (step, last)
        last = step
    steps.append(last)
    if last == STEPS:  # done before the kills were: once more, from the start
        for path in (folder / "killed").iterdir():
            path.unlink()
        last = 0
print("steps at the kills:", *steps, flush=True)
assert os.waitpid(child("killed", True), 0)[1] == 0
"""


def curve(path: Path) -> dict[int, set[str]]:
    """All losses recorded of each step, as hexadecimal floats."""
    found: dict[int, set[str]] = {}
    for line in path.read_text().splitlines():
        step, loss = line.split()
        found.setdefault(int(step), set()).add(loss)
    return found


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    train_autoencoder(CONFIG, pictures(), options(steps=1), tmp_path / "source")
    (tmp_path / "job.py").write_text(JOB)
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "job.py", str(tmp_path / "source"), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("steps at the kills"))
    steps = [int(step) for step in line.split()[4:]]
    assert len(steps) >= KILLS and len(set(steps)) > 5, steps  # killed here and there, not only while it started

    whole, killed = curve(tmp_path / "whole.txt"), curve(tmp_path / "killed.txt")
    assert len(whole) == 90 and whole == killed  # a step done again after a kill gives the same loss, bit for bit
    one, other = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for a, b in zip(*(state["optimizer"]["state"].values() for state in (one, other)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == written  # no half-written file is left
