"""`bldm sample`: paint a labelled grid of samples."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..data import PICTURES
from ..generate import SampleFolder, Share, fingerprint
from ..grid import draw_grid, save_png
from ..latents import PackedLatents
from ..painter import Painter
from ..progress import progress_bar
from ..sampling import StepInfo
from .common import choose_device, console, load_model, one_line_errors
from .conditions import choose, inpainting


@one_line_errors
def sample(
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or user/name on the hub [default: bundled; with --text the emoji model]")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="How many samples")] = 64,
    steps: Annotated[int, typer.Option(help="Sampling steps")] = 16,
    label: Annotated[list[str] | None, typer.Option(help="Class name or index; may be repeated")] = None,
    text: Annotated[list[str] | None, typer.Option(help='What to paint, as in "a red apple"; may be repeated')] = None,
    text_features: Annotated[
        Path | None, typer.Option(help="Features of texts instead: .npy, or safetensors with a tensor 'features'")
    ] = None,
    inpaint: Annotated[Path | None, typer.Option(help="Image to repaint a part of")] = None,
    mask: Annotated[Path | None, typer.Option(help="Which part: an image, white where to repaint")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none")] = 2.0,
    temperature: Annotated[float, typer.Option(help="Divides the logits")] = 1.0,
    rule: Annotated[str, typer.Option(help="Reverse rule: plugin, marginal, renoise, ddim")] = "plugin",
    seed: Annotated[int, typer.Option(help="64-bit seed: the same seed gives the same samples")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once")] = 64,
    precision: Annotated[str | None, typer.Option(help="Sample with the model's engine: bf16, fp8 [default: without]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write; or a folder, for one file a sample")] = Path("samples.png"),
    packed: Annotated[bool, typer.Option("--packed", help="A folder of packed latents, not of images")] = False,
    latents: Annotated[Path | None, typer.Option(help="Also write the packed latents (safetensors)")] = None,
) -> None:
    """Sample images, of classes or texts where the model takes such, and write them as a labelled grid or into a folder.

    Into a folder, torchrun's processes share the work, and what is there already is skipped.
    """
    share, folder = Share.of_launcher(), out.suffix.lower() != ".png"
    if out.suffix.lower() in PICTURES - {".png"}:
        raise ValueError(f"out: expected a .png or a folder, got {out}")
    if not folder and (share.processes > 1 or packed):
        raise ValueError(f"out: {'packed latents go' if packed else 'several processes write'} into a folder, got {out}")
    if folder and latents is not None:
        raise ValueError("latents: a folder of samples has either images or, with --packed, latents")
    where = choose_device(device, share.local_rank if share.processes > 1 else None)
    loaded = load_model(model, where, bundled="emoji" if text else "fashion-mnist")
    wanted = choose(loaded, label or [], text or [], text_features, num_samples)
    keep_mask, keep_bits = inpainting(loaded, inpaint, mask, where)
    painter = loaded if precision is None else loaded.optimize(precision)
    sampler = painter.sampler(rule=rule)
    options: dict[str, Any] = {
        "temperature": temperature,
        "seed": seed,
        "guidance_scale": 1.0 if wanted.cond is None else guidance,
        "keep_mask": None if keep_mask is None else keep_mask[0],
        "keep_bits": None if keep_bits is None else keep_bits[0],
    }
    if folder:
        tensors = {"condition": wanted.cond, "keep_mask": options["keep_mask"], "keep_bits": options["keep_bits"]}
        settings = {
            "model": fingerprint(loaded.state_dict()),
            "conditions": fingerprint(tensors),
            "steps": steps,
            "rule": rule,
            "precision": precision,
            **{name: value for name, value in options.items() if name not in tensors},
        }
        target = SampleFolder(out, num_samples, batch_size, settings, packed=packed, share=share)

        def draw(first: int, count: int) -> torch.Tensor:
            cond = None if wanted.cond is None else wanted.cond[first : first + count]
            return sampler.sample(count, steps, sample_offset=first, cond=cond, **options)

        _fill(target, painter, draw)
        return
    batches = -(-num_samples // batch_size)
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("sampling", total=batches * steps)

        def advance(info: StepInfo) -> None:
            progress.advance(task)

        drawn = sampler.sample(
            num_samples,
            steps,
            cond=wanted.cond,
            batch_size=batch_size,
            callback=advance,
            **options,
        )
        images = painter.decode(drawn, batch_size=batch_size).cpu()
    seconds = time.perf_counter() - start
    save_png(draw_grid(images, wanted.captions), out)
    if latents is not None:
        PackedLatents(drawn, loaded.latent_shape).save(latents)
    console.print(
        f"{out}: {num_samples} samples in {seconds:.1f} s ({num_samples / seconds:.1f} a second, {steps} steps, {where})",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _fill(folder: SampleFolder, model: Painter, draw: Callable[[int, int], torch.Tensor]) -> None:
    """Write what is missing of this process's share; `draw` gives the packed latents (first sample, number of samples)."""
    missing, share = folder.missing(), folder.share
    total, start = sum(count for _, count in missing), time.perf_counter()
    with progress_bar(console if share.rank == 0 else Console(quiet=True)) as progress:
        task = progress.add_task("sampling", total=total)
        for first, count in missing:
            folder.write(first, PackedLatents(draw(first, count), model.latent_shape), model.decode)
            progress.advance(task, count)
    seconds = time.perf_counter() - start
    who = f" by process {share.rank} of {share.processes}" if share.processes > 1 else ""
    console.print(
        f"{folder.path}: {total} samples{who} in {seconds:.1f} s ({total / seconds:.1f} a second)",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
