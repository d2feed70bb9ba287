"""`bldm sample`: paint a labelled grid of samples."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..diffusion import BinaryLatentDiffusion
from ..grid import draw_grid, save_png
from ..latents import PackedLatents
from ..progress import progress_bar
from ..sampling import StepInfo
from .common import choose_device, console, load_model, one_line_errors


def _labels(model: BinaryLatentDiffusion, names: list[str], num_samples: int) -> torch.Tensor | None:
    """Class indices of the samples, in order of class: the named ones, or all, in equal shares."""
    num_classes = model.denoiser.num_classes
    if num_classes is None:
        if names:
            raise ValueError("label: this model has no classes")
        return None
    known = {name.lower(): i for i, name in enumerate(model.class_names or [])}
    known |= {str(i): i for i in range(num_classes)}
    chosen = []
    for name in names or map(str, range(num_classes)):
        if name.lower() not in known:
            raise ValueError(f"label: {name!r} is not a class of this model; expected one of {', '.join(known)}")
        chosen.append(known[name.lower()])
    return torch.tensor([chosen[i * len(chosen) // num_samples] for i in range(num_samples)], dtype=torch.int64)


@one_line_errors
def sample(
    model: Annotated[Path | None, typer.Option(help="Model folder, or user/name on the hub [default: bundled]")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="How many samples")] = 64,
    steps: Annotated[int, typer.Option(help="Sampling steps")] = 16,
    label: Annotated[list[str] | None, typer.Option(help="Class name or index; may be repeated")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none")] = 2.0,
    temperature: Annotated[float, typer.Option(help="Divides the logits")] = 1.0,
    rule: Annotated[str, typer.Option(help="Reverse rule: plugin, marginal, renoise, ddim")] = "plugin",
    seed: Annotated[int, typer.Option(help="64-bit seed: the same seed gives the same samples")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("samples.png"),
    latents: Annotated[Path | None, typer.Option(help="Also write the packed latents (safetensors)")] = None,
) -> None:
    """Sample images and write them as a labelled grid."""
    where = choose_device(device)
    loaded = load_model(model, where)
    labels = _labels(loaded, label or [], num_samples)
    conditional = labels is not None
    if labels is not None:
        labels = labels.to(where)
    sampler = loaded.sampler(rule=rule)
    batches = -(-num_samples // batch_size)
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("sampling", total=batches * steps)

        def advance(info: StepInfo) -> None:
            progress.advance(task)

        packed = sampler.sample(
            num_samples,
            steps,
            temperature=temperature,
            seed=seed,
            cond=labels,
            guidance_scale=guidance if conditional else 1.0,
            batch_size=batch_size,
            callback=advance,
        )
        images = loaded.decode(packed, batch_size=batch_size).cpu()
    seconds = time.perf_counter() - start
    names = loaded.class_names or []
    captions = None if labels is None else [names[i] if i < len(names) else str(i) for i in labels.tolist()]
    save_png(draw_grid(images, captions), out)
    if latents is not None:
        PackedLatents(packed, loaded.latent_shape).save(latents)
    console.print(
        f"{out}: {num_samples} samples in {seconds:.1f} s ({num_samples / seconds:.1f} a second, {steps} steps, {where})",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
