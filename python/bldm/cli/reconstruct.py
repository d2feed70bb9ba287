"""`bldm reconstruct`: images beside what the autoencoder makes of their bits."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..data import load_images
from ..grid import draw_grid, save_png
from .common import choose_device, console, load_model, one_line_errors


@one_line_errors
def reconstruct(
    data: Annotated[Path, typer.Argument(help="IDX folder, NPZ file or folder of images")],
    model: Annotated[Path | None, typer.Option(help="Model folder, or user/name on the hub [default: bundled]")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="How many images")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("reconstructions.png"),
) -> None:
    """Encode test images to bits and decode them again: pairs of image and reconstruction, with the error."""
    where = choose_device(device)
    loaded = load_model(model, where)
    images = load_images(data, "test", image_size=loaded.autoencoder.image_size).images[:num_images].to(where)
    images = images.float() / 127.5 - 1
    packed = loaded.encode(images)
    decoded = loaded.decode(packed)
    error = (decoded - images).abs().mean().item() / 2
    pairs = torch.stack([images, decoded], 1).flatten(0, 1).cpu()
    save_png(draw_grid(pairs, ["image", "from bits"] * len(images), columns=8), out)
    console.print(
        f"{out}: {len(images)} images, {packed[0].numel()} bytes each, mean absolute error {error:.4f} of the range",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
