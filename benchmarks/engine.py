"""The engines against the paper's code: the churches configuration (256 px, 64 bits a position, 24 x 768), random weights.

    python benchmarks/engine.py [--parts engine,shipped,compiled,images,...] [--batches 1,8,64] [--curves batch,bits,grid,steps]
                                [--precisions bf16,fp8] [--commit hash]

Parts: `engine`, `shipped`, `compiled` are milliseconds a sampling step (of the engines; of the paper's code as it is, and with
its denoiser in bf16 under torch.compile); `images`, `images-shipped` and `images-compiled` whole calls, 16 steps and decoding;
`curves` the cost of the engines as the work grows. Engines are first held against the float32 model. Times are of whole calls,
host to host: the median of several. Writes benchmarks/results/engine_<device>.json after every row, with date and commit; parts
that a run leaves out keep their earlier numbers.
"""

import argparse
import gc
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bldm
import torch
from accelerate import STEPS, median_ms, rounded
from accelerate_models import PaperDenoiser, PaperSampler
from autoencoder import PAPER as AUTOENCODER
from bldm.bench.run import commit as current_commit
from torch import Tensor, nn

import bldm_kernels as bk

DENOISER: dict[str, Any] = {"width": 768, "depth": 24, "num_heads": 12}
PRECISIONS, LIMITS = ("bf16", "fp8"), {"bf16": 2e-2, "fp8": 8e-2}
CURVES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "bits": (32, 64, 128, 256),
    "grid": (8, 16, 32, 64),
    "steps": (4, 8, 16, 32, 64, 128, 256),
}
STANDARD = {"batch": 64, "bits": 64, "grid": 16, "steps": STEPS}  # of a curve, what the curve is not over
Row = dict[str, Any]


def lively(model: nn.Module) -> Any:
    """Random weights under which all layers matter: LayerScale 1, and a head that is not 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(1.0)
        model.get_submodule("denoiser.head" if hasattr(model, "denoiser") else "head").weight.normal_(std=0.05)  # type: ignore
    return model.eval()


def paper_model() -> bldm.BinaryLatentDiffusion:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return lively(bldm.BinaryLatentDiffusion(AUTOENCODER, DENOISER, num_steps=64))


def sampler_of(denoiser: Any, grid: int, bits: int) -> bldm.FastSampler:
    return bldm.FastSampler(denoiser, bk.BernoulliSchedule("linear", 256), latent_shape=(grid * grid, bits))


@torch.no_grad()
def difference(engine: Any, model: bldm.BinaryDenoiser, batch: int) -> float:
    """Norm of the difference of the logits relative to the float32 model's; raises where it is beyond the engine's promise."""
    x_t = bk.random_bits(batch, (model.num_positions, model.num_bits), seed=0, device="cuda")
    t = torch.tensor([1, 20, 40, 64], device="cuda").repeat(batch)[:batch]
    expected = model(x_t, t)
    found = ((engine(x_t, t) - expected).norm() / expected.norm()).item()
    if not found <= LIMITS[engine.precision]:
        raise RuntimeError(f"{engine.precision}: logits differ by {found:.3g}, at most {LIMITS[engine.precision]} is promised")
    return found


def engine_steps(batches: list[int]) -> Iterator[tuple[str, int, Row]]:
    model = paper_model().denoiser
    for precision in PRECISIONS:
        engine = model.optimize(precision)
        for batch in batches:
            differs = difference(engine, model, batch)
            sampler = sampler_of(engine, 16, 64)
            ms = median_ms(lambda sampler=sampler, batch=batch: sampler.sample(batch, STEPS)) / STEPS
            (info,) = sampler.graphs
            first = {"rehearsal_s": info.rehearsal_seconds, "capture_s": info.capture_seconds}
            yield f"engine, {precision}", batch, {"ms_per_step": ms, "difference": differs, **first}


class Compiled(nn.Module):
    """The paper's denoiser under torch.compile, in bf16."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = torch.compile(denoiser, mode="reduce-overhead", dynamic=False)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.denoiser(x, **options).float()


def paper_sampler(compiled: bool) -> PaperSampler:
    torch.manual_seed(0)
    with torch.device("cuda"):
        denoiser = PaperDenoiser()
    return PaperSampler(Compiled(denoiser) if compiled else denoiser).cuda().eval()


def opponent_steps(compiled: bool, batches: list[int]) -> Iterator[tuple[str, int, Row]]:
    model = paper_sampler(compiled)
    for batch in batches:
        ms = median_ms(lambda batch=batch: model.sample(sample_steps=STEPS, b=batch)) / STEPS
        yield "reference, bf16, compiled" if compiled else "reference as shipped", batch, {"ms_per_step": ms}


def per_call(ms: float, batch: int) -> Row:
    return {"ms": ms, "images_per_s": 1e3 * batch / ms}


def engine_images(batches: list[int]) -> Iterator[tuple[str, int, Row]]:
    model = paper_model()
    for precision in PRECISIONS:
        engine = model.optimize(precision)
        for batch in batches:
            difference(engine.denoiser, model.denoiser, batch)
            ms = median_ms(lambda engine=engine, batch=batch: engine.sample(batch, STEPS))
            yield f"engine, {precision}", batch, per_call(ms, batch)


def opponent_images(compiled: bool, batches: list[int]) -> Iterator[tuple[str, int, Row]]:
    sampler = paper_sampler(compiled)
    torch.manual_seed(0)
    with torch.device("cuda"):
        autoencoder = bldm.BinaryAutoencoder(**AUTOENCODER).eval()

    @torch.no_grad()
    def paint(batch: int) -> Tensor:
        bits = sampler.sample(sample_steps=STEPS, b=batch)
        embedded = ((2 * bits - 1) @ autoencoder.embedding).unflatten(1, (16, 16)).permute(0, 3, 1, 2)
        with torch.autocast("cuda", torch.bfloat16, enabled=compiled):
            return autoencoder.decoder(embedded.contiguous())

    for batch in batches:
        ms = median_ms(lambda batch=batch: paint(batch))
        yield "reference, bf16, compiled" if compiled else "reference as shipped", batch, per_call(ms, batch)


def curve(name: str, precision: str) -> Iterator[tuple[int, Row]]:
    """ms a step, ms an image and MiB an image (buffers and activations of the captured loop) as one quantity grows."""
    for value in CURVES[name]:
        at = {**STANDARD, **({"batch": 8} if name == "grid" else {}), name: value}
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = lively(bldm.BinaryDenoiser(at["grid"] ** 2, at["bits"], **DENOISER))
        few = bk.random_bits(2, (at["grid"] ** 2, at["bits"]), seed=0, device="cuda")
        sampler = sampler_of(model.optimize(precision, calibration=few), at["grid"], at["bits"])
        del model
        ms = median_ms(lambda sampler=sampler, at=at: sampler.sample(at["batch"], at["steps"]), seconds=0.3)
        each = {"ms_per_step": ms / at["steps"], "ms_per_image": ms / at["batch"]}
        yield value, {**each, "mib_per_image": sampler.graph_bytes() / 2**20 / at["batch"]}
        del sampler
        gc.collect()
        torch.cuda.empty_cache()


STEP_PARTS: dict[str, Callable[[list[int]], Iterator[tuple[str, int, Row]]]] = {
    "engine": engine_steps,
    "shipped": lambda batches: opponent_steps(False, batches),
    "compiled": lambda batches: opponent_steps(True, batches),
}
IMAGE_PARTS: dict[str, Callable[[list[int]], Iterator[tuple[str, int, Row]]]] = {
    "images": engine_images,
    "images-shipped": lambda batches: opponent_images(False, batches),
    "images-compiled": lambda batches: opponent_images(True, batches),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join([*STEP_PARTS, *IMAGE_PARTS, "curves"]))
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of the curves")
    parser.add_argument("--commit", help="of this source, where it is no git checkout")
    arguments = parser.parse_args()
    batches = [int(size) for size in arguments.batches.split(",")]
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    path = Path(__file__).parent / "results" / f"engine_{device}.json"
    results: Row = json.loads(path.read_text()) if path.exists() else {}
    commit, date = arguments.commit or current_commit(), datetime.now(timezone.utc).strftime("%Y-%m-%d")

    def note(*keys: str, row: Row) -> None:
        place = results
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = rounded(row) | {"date": date, "commit": commit}
        results["machine"] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": "python benchmarks/engine.py",
            "bldm": bldm.__version__,
            "setting": f"{STEPS} steps where nothing else is said; curves otherwise at {STANDARD}, over the grid at batch 8",
        }
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(", ".join(keys), json.dumps(rounded(row)), flush=True)

    for part in arguments.parts.split(","):
        if part == "curves":
            for name in arguments.curves.split(","):
                for precision in arguments.precisions.split(","):
                    for value, row in curve(name, precision):
                        note("curves", name, precision, str(value), row=row)
            continue
        made, section = (STEP_PARTS[part], "step") if part in STEP_PARTS else (IMAGE_PARTS[part], "images")
        for name, batch, row in made(batches):
            note(section, name, str(batch), row=row)


if __name__ == "__main__":
    main()
