"""Two processes that share a batch learn what one learns from all of it, on the CPU and on two GPUs."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import require_gpu

JOB = """
import torch
from accelerate import Accelerator
from bldm.denoiser import BinaryDenoiser
from bldm.training.learner import Learner
from bldm.training.options import TrainOptions
from torch import nn
from torch.nn import functional as F
import bldm_kernels as bk

accel = Accelerator(mixed_precision="no")
torch.set_num_threads(1)


def learn(learner, step):
    torch.manual_seed(step)
    x_t, t, goal = bk.random_bits(12, (16, 8), seed=step), torch.randint(1, 257, (12,)), (1 + step) * torch.randn(12, 16, 8)
    share = [whole.tensor_split(accel.num_processes)[accel.process_index].to(accel.device) for whole in (x_t, t, goal)]
    with learner.computing():
        loss = F.mse_loss(learner.module(*share[:2]).float(), share[2])
    learner.update(loss, step, 1e-3)


def learned(precision):
    torch.manual_seed(accel.process_index)  # the first one's weights count
    model = BinaryDenoiser(16, 8, width=64, depth=2, num_heads=2)
    nn.init.normal_(model.head.weight, std=0.1)
    # Adam does not see how large gradients are: but for those of some steps, which are clipped.
    learner = Learner(model, TrainOptions(mixed_precision=precision, grad_clip=2.5), accel)
    for step in range(8):
        learn(learner, step)
    return {part: learner.state()[part] for part in ("model", "ema")}


torch.save({precision: learned(precision) for precision in ("no", "bf16")}, f"of{accel.num_processes}-{accel.process_index}.pt")
accel.wait_for_everyone()
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_processes_learn_what_one_does(device: str, tmp_path: Path) -> None:
    on_cpu = device == "cpu"
    if not on_cpu:
        require_gpu()
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU only")
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": str(on_cpu).lower()} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "job.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-5000:]
    alone, one, other = (torch.load(tmp_path / f"of{name}.pt", map_location="cpu") for name in ("1-0", "2-0", "2-1"))
    for precision, part in product(("no", "bf16"), ("model", "ema")):
        expected, shared, also = (run[precision][part] for run in (alone, one, other))
        assert all(torch.equal(shared[name], also[name]) for name in expected)
        difference = torch.cat([(shared[name] - value).abs().flatten() for name, value in expected.items()])
        assert difference.mean() < (1e-7 if precision == "no" else 5e-5), (precision, part)
