"""`bldm sample`: paint a labelled grid of samples."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..grid import draw_grid, save_png
from ..latents import PackedLatents
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("samples.png"),
    latents: Annotated[Path | None, typer.Option(help="Also write the packed latents (safetensors)")] = None,
) -> None:
    """Sample images, of classes or texts where the model takes such, and write them as a labelled grid."""
    where = choose_device(device)
    loaded = load_model(model, where, bundled="emoji" if text else "fashion-mnist")
    wanted = choose(loaded, label or [], text or [], text_features, num_samples)
    keep_mask, keep_bits = inpainting(loaded, inpaint, mask, where)
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
            cond=wanted.cond,
            guidance_scale=1.0 if wanted.cond is None else guidance,
            keep_mask=None if keep_mask is None else keep_mask[0],
            keep_bits=None if keep_bits is None else keep_bits[0],
            batch_size=batch_size,
            callback=advance,
        )
        images = loaded.decode(packed, batch_size=batch_size).cpu()
    seconds = time.perf_counter() - start
    save_png(draw_grid(images, wanted.captions), out)
    if latents is not None:
        PackedLatents(packed, loaded.latent_shape).save(latents)
    console.print(
        f"{out}: {num_samples} samples in {seconds:.1f} s ({num_samples / seconds:.1f} a second, {steps} steps, {where})",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
