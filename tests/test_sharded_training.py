"""FSDP2 on two processes: the model that whole copies train, checkpoints that resume exactly and fit both."""

import os
import subprocess
import sys
from pathlib import Path

import bldm
import pytest
import torch
from bldm.training.autoencoder import train_autoencoder
from test_training import CONFIG, equal, options, pictures

pytestmark = pytest.mark.usefixtures("one_thread")
JOB = """
import os, sys
from pathlib import Path
import torch
from bldm.training import loop
from bldm.training.denoiser import train_denoiser
from bldm.training.autoencoder import train_autoencoder
from test_training import CONFIG, DENOISER, options, pictures
from torch.distributed.tensor import DTensor

source, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
torch.set_num_threads(1)
rows, call = {}, loop.Batches.__call__

def watched(self, step):
    order = call(self, step)
    rows.setdefault(name, []).append(order)
    return order

loop.Batches.__call__ = watched

class Watched(loop.Learner):
    def __init__(self, *args):
        super().__init__(*args)
        parameters = list(self.model.parameters())
        sharded = [isinstance(p, DTensor) for p in parameters]
        assert all(sharded) if name.startswith("fsdp") else not any(sharded)
        if sharded[0]:
            local = sum(p.to_local().numel() for p in parameters)
            assert local < 0.6 * sum(p.numel() for p in parameters)

loop.Learner = Watched

def run(label, **changes):
    global name
    name = label
    training = options(**{"fsdp": name.startswith("fsdp"), "log_dir": str(folder / f"{name}-log"), **changes})
    out = folder / name
    return train_denoiser(source, {**DENOISER, "dropout": 0.0}, pictures(), training, out, num_steps=16)

run("fsdp")
run("whole")
run("fsdp-bf16", mixed_precision="bf16")
run("fsdp-parts", max_minutes=1e-6)
run("fsdp-parts", resume=True)
run("whole-first", max_minutes=1e-6)
if rank == 0:
    os.replace(folder / "whole-first", folder / "fsdp-then")
torch.distributed.barrier()
run("fsdp-then", resume=True)
name = "gan"
gan = train_autoencoder(CONFIG, pictures(), options(), folder / "gan", gan_weight=0.5, gan_start=5)
torch.save(gan.state_dict(), folder / f"gan{rank}.pt")
torch.save(rows, folder / f"rows{rank}.pt")
"""


def test_two_processes_share_one_model(tmp_path: Path) -> None:
    train_autoencoder(CONFIG, pictures(), options(steps=1), tmp_path / "source")
    (tmp_path / "job.py").write_text(JOB)
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
        [*command, str(tmp_path / "source"), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[:5000]
    names = ("fsdp", "whole", "fsdp-bf16", "fsdp-parts", "fsdp-then")
    models = {name: bldm.BinaryLatentDiffusion.from_pretrained(tmp_path / name) for name in names}
    states = {name: torch.load(tmp_path / name / "checkpoint.pt") for name in names}
    assert equal(models["fsdp"], models["fsdp-parts"])
    for name, atol in (("whole", 1e-5), ("fsdp-then", 1e-5), ("fsdp-bf16", 0.02)):
        for key, value in models["fsdp"].state_dict().items():
            torch.testing.assert_close(models[name].state_dict()[key], value, rtol=0, atol=atol)
        assert states[name]["step"] == 20 and states[name]["averaged"] == 20
    shapes = {
        name: [{k: v.shape for k, v in moments.items()} for moments in state["optimizer"]["state"].values()]
        for name, state in states.items()
    }
    assert all(shape == shapes["whole"] for shape in shapes.values())  # whole, whoever wrote them
    for one, other in zip(*(states[name]["optimizer"]["state"].values() for name in ("fsdp", "fsdp-parts")), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    order, others = (torch.load(tmp_path / f"rows{rank}.pt") for rank in (0, 1))
    for name in names[:4]:
        assert len(order[name]) == 20 and all(map(torch.equal, order[name], others[name]))
        assert all(map(torch.equal, order[name], order["whole"]))  # the same seed, the same order of the data
    assert any((tmp_path / "fsdp-log").iterdir())
    one, other = (torch.load(tmp_path / f"gan{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[key], other[key]) and bool(one[key].isfinite().all()) for key in one)
    assert torch.load(tmp_path / "gan" / "checkpoint.pt")["partner"]["averaged"] == 15
