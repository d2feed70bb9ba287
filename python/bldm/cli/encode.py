"""`bldm encode`: the latents of a data set, in a store."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..data import open_images
from ..progress import progress_bar
from ..store import encode_dataset
from .common import choose_device, console, load_autoencoder, load_captions, one_line_errors


@one_line_errors
def encode(
    data: Annotated[Path, typer.Argument(help="IDX folder, NPZ file or folder of images")],
    out: Annotated[Path, typer.Option(help="Folder of the store; an interrupted one is continued")],
    model: Annotated[Path | None, typer.Option(help="Autoencoder or model: folder, or user/name [default: bundled]")] = None,
    split: Annotated[str, typer.Option(help="train or test")] = "train",
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images too")] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Captions too, a sample for each of them: vector or tokens, as in `bldm train`"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once")] = 256,
    shard_samples: Annotated[int | None, typer.Option(min=1, help="Latents a file [default: as many as make 64 MiB]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
) -> None:
    """Encode all images of a data set to packed latents, with their labels or captions, for training and searching."""
    autoencoder = load_autoencoder(model, choose_device(device)).eval()
    images = open_images(data, split, autoencoder.image_size)
    captions = None if text is None else load_captions(data, split, images.captions, text)
    samples = len(images) if captions is None else int(captions.counts.sum())
    counts: list[int] = []
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("encoding", total=samples * (2 if flip else 1))

        def advance(done: int) -> None:
            counts.append(done)
            progress.update(task, completed=done)

        store = encode_dataset(
            autoencoder,
            images,
            out,
            batch_size=batch_size,
            mirrored=flip,
            captions=captions,
            samples_per_shard=shard_samples,
            metadata={"split": split},
            progress=advance,
        )
    seconds, new = time.perf_counter() - start, len(store) - counts[0]
    there = f" ({counts[0]} were there)" if counts[0] else ""
    speed = f" in {seconds:.1f} s ({new / seconds:.0f} a second)" if new else ""
    size = sum(column.nbytes for column in store.index.layout.fields.values())
    console.print(
        f"{out}: {len(store)} latents of {store.latent_shape} bits, {size} bytes each{there}{speed}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
