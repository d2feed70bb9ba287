"""One method on one data set: trained for a given time, judged, and its part of the result file written.

    python benchmarks/comparison/compare.py --data-set fashion_mnist --method binary --data /usr/share/datasets/fashion-mnist
    python benchmarks/comparison/compare.py --data-set emoji --method tokens --data emoji

The same command goes on where it was interrupted. Methods: binary (this library), tokens (VQ and masked prediction), gaussian
(latent diffusion). After the three: `python benchmarks/comparison/show.py benchmarks/results/comparison_fashion_mnist.json`.
"""

import datetime
import json
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import bldm
import torch
import typer
from bldm.bench.run import commit as current_commit
from bldm.bench.run import device_name
from bldm.checkpoint import write_atomically
from bldm.engine import DiffusionEngine
from bldm.training.loop import SUMMARY
from judges import JUDGES, NUM_SAMPLES
from learn import learn, read
from settings import METHODS, SETTINGS, Setting
from torch import Tensor, nn


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Painter:
    """`sample` of any method, in bfloat16 on a GPU; the binary one's sampler is kept, and with it what it captured.

    engine: the same of the binary model's engine, on a GPU.
    """

    engine: "Painter | None" = None

    def __init__(self, model: Any, device: torch.device):
        self.model, self.device = model, device
        own = isinstance(model, bldm.BinaryLatentDiffusion)
        self.sampler = model.sampler() if own or isinstance(model, DiffusionEngine) else None
        if own and device.type == "cuda":
            self.engine = Painter(model.optimize("bf16"), device)

    def _computing(self) -> Any:
        """The engine computes in bfloat16 by itself."""
        plain = self.device.type == "cuda" and not isinstance(self.model, DiffusionEngine)
        return torch.autocast("cuda", torch.bfloat16) if plain else nullcontext()

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int, guidance: float, batch_size: int) -> Tensor:
        with self._computing():
            if self.sampler is None:
                return self.model.sample(
                    len(labels), steps, labels=labels, guidance_scale=guidance, seed=steps, batch_size=batch_size
                ).float()
            latents = self.sampler.sample(
                len(labels), steps, cond=labels, guidance_scale=guidance, seed=steps, batch_size=batch_size
            )
            return self.model.decode(latents, batch_size=batch_size).float()

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """In float32: which bit or code is chosen may hang on the last digit."""
        return torch.cat([self.model.decode(self.model.encode(part)).float() for part in images.split(1000)])

    def images_per_second(self, labels: Tensor, steps: int, guidance: float, repeats: int = 3) -> float:
        """One batch, from noise to pixels; the first call warms up."""
        times = []
        for _ in range(repeats + 1):
            self._wait()
            start = time.perf_counter()
            self.sample(labels, steps, guidance, len(labels))
            self._wait()
            times.append(time.perf_counter() - start)
        return len(labels) / statistics.median(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def judged(painter: Painter, judge: Any, setting: Setting, num_samples: int, batch_size: int) -> dict[str, Any]:
    """Real images, their reconstructions, and samples at every number of steps and guidance, with their speed."""
    real, shown = judge.references()
    result: dict[str, Any] = {
        "real_images": judge.measure(real, shown),
        "reconstructions": judge.measure(painter.reconstruct(real), shown),
        "samples": [],
    }
    asked = judge.asked(num_samples)
    for guidance in setting.guidance:
        for steps in setting.steps:
            some = next(iter(asked.values()))[0]
            batch = some[torch.arange(batch_size, device=some.device) % len(some)]
            speed = {"images_per_second": round(painter.images_per_second(batch, steps, guidance), 1)}
            if painter.engine is not None:
                speed["engine_images_per_second"] = round(painter.engine.images_per_second(batch, steps, guidance), 1)
            for name, (labels, wanted) in asked.items():
                measured = judge.measure(painter.sample(labels, steps, guidance, batch_size), wanted)
                row = {"set": name, "guidance": guidance, "steps": steps, **measured, **speed}
                result["samples"].append(row)
                print(row, flush=True)
    return result


def main(
    data_set: Annotated[str, typer.Option(help=", ".join(SETTINGS))],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))],
    data: Annotated[Path, typer.Option(help="Folder of the images")],
    runs: Annotated[Path, typer.Option(help="Where trained models are kept")] = Path("runs/comparison"),
    minutes: Annotated[str | None, typer.Option(help="Of training: autoencoder, denoiser, for example 2,4")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Of either stage")] = None,
    num_samples: Annotated[int | None, typer.Option(help="For each figure [default: that of the data set]")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at once, also where they are timed")] = 1000,
    commit: Annotated[str | None, typer.Option(help="What the result calls the version [default: git's word]")] = None,
    out: Annotated[Path | None, typer.Option(help="[default: benchmarks/results/comparison_<data set>.json]")] = None,
) -> None:
    for name, value, known in (("data-set", data_set, SETTINGS), ("method", method, METHODS)):
        if value not in known:
            raise SystemExit(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    setting = SETTINGS[data_set]
    if minutes is not None:
        first, second = (float(part) for part in minutes.split(","))
        setting = replace(setting, minutes=(first, second))
    out = out or Path(f"benchmarks/results/comparison_{data_set}.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = runs / data_set
    images, captions = read(data, setting)
    model = learn(method, setting, images, captions, folder / method, max_steps)
    stages = [json.loads((folder / method / name / SUMMARY).read_text()) for name in ("autoencoder", "model")]
    judge = JUDGES[data_set](data, setting, folder / "judge.pt", device)
    entry = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or current_commit(),
        "parameters": {part: num_parameters(getattr(model, part)) for part in ("autoencoder", "denoiser")},
        "training_minutes": [summary["minutes"] for summary in stages],
        "training_steps": [summary["steps_done"] for summary in stages],
        "latent_shape": list(model.latent_shape),
        "batch_size": batch_size,
        **judged(Painter(model, device), judge, setting, num_samples or NUM_SAMPLES[data_set], batch_size),
    }
    result = json.loads(out.read_text()) if out.is_file() else {"data": data_set, "methods": {}}
    result["methods"][method] = entry
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(out, lambda name: Path(name).write_text(text))
    print(out)


if __name__ == "__main__":
    typer.run(main)
