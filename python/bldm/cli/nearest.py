"""`bldm nearest`: the stored latents closest to given ones, for example to see whether a model paints what it was trained on."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..data import PICTURES, open_images, to_float
from ..diffusion import BinaryLatentDiffusion
from ..grid import draw_grid, save_png
from ..latents import PackedLatents
from ..store import LatentStore
from .common import choose_device, console, load_autoencoder, load_model, one_line_errors
from .conditions import choose


@one_line_errors
def nearest(
    query: Annotated[
        Path | None,
        typer.Argument(help="File of packed latents, a picture, or images as for encode [default: fresh samples of the model]"),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder that `bldm encode` wrote")] = Path("store"),
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours of each query")] = 5,
    num_queries: Annotated[int, typer.Option("--num-queries", "-n", min=1, help="At most so many queries")] = 8,
    model: Annotated[Path | None, typer.Option(help="Autoencoder or model: folder, or user/name [default: bundled]")] = None,
    split: Annotated[str, typer.Option(help="Of the images: train or test")] = "test",
    steps: Annotated[int, typer.Option(help="Sampling steps, for fresh samples")] = 16,
    guidance: Annotated[float, typer.Option(help="Guidance scale, for fresh samples")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed, for fresh samples")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write: a row a query, itself first")] = Path("nearest.png"),
) -> None:
    """Find the stored latents nearest to the queries in Hamming distance, and draw them side by side."""
    where = choose_device(device)
    opened = LatentStore(store)
    painter = load_model(model, where) if query is None else None
    autoencoder = load_autoencoder(model, where).eval() if painter is None else painter.autoencoder
    if opened.latent_shape != tuple(autoencoder.latent_shape):
        raise ValueError(f"store: {store} holds latents of {opened.latent_shape} bits, the model has {autoencoder.latent_shape}")
    if painter is not None:
        queries = _paint(painter, num_queries, steps, guidance, seed)
    elif query is not None and (query.is_dir() or query.suffix.lower() in {".npz", *PICTURES}):
        images = open_images(query, split, autoencoder.image_size)
        queries = autoencoder.encode(to_float(images.read(0, num_queries).to(where)))
    else:
        assert query is not None
        queries = _latents(query, opened, num_queries).to(where)
    distances, indices = opened.nearest(queries, k)
    found = opened[indices.flatten()]
    console.print(_table(opened, distances, indices, found.get("label")))
    rows = torch.cat([queries.unsqueeze(1), found["packed"].to(where).unflatten(0, indices.shape)], 1).flatten(0, 1)
    captions = []
    for row, (near, far) in enumerate(zip(indices.tolist(), distances.tolist(), strict=True)):
        captions += [f"query {row}", *(f"{index}: {distance}" for index, distance in zip(near, far, strict=True))]
    with torch.no_grad():
        decoded = torch.cat([autoencoder.decode(part) for part in rows.split(64)])
    save_png(draw_grid(decoded.cpu(), captions, columns=k + 1), out)
    share = distances[:, 0].float().mean().item() / math.prod(opened.latent_shape)
    same = int((distances[:, 0] == 0).sum())
    console.print(
        f"{out}: {len(queries)} queries differ from their nearest latent in {share:.2%} of the bits; {same} are in the store",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _table(store: LatentStore, distances: Tensor, indices: Tensor, labels: Tensor | None) -> Table:
    """A row a query: index, class and distance of each neighbour."""
    names = store.metadata.get("class_names") or []
    k, total = indices.shape[1], math.prod(store.latent_shape)
    table = Table(title=f"Nearest of {len(store.available)} latents: index and distance in bits, of {total}")
    for heading in ("query", *range(1, k + 1)):
        table.add_column(str(heading), justify="right")
    for row in range(len(indices)):
        cells = [str(row)]
        for rank in range(k):
            label = -1 if labels is None else int(labels[row * k + rank])
            name = "" if labels is None else f" {names[label] if label < len(names) else label}"
            cells.append(escape(f"{int(indices[row, rank])}{name}: {int(distances[row, rank])}"))
        table.add_row(*cells)
    return table


def _paint(model: BinaryLatentDiffusion, count: int, steps: int, guidance: float, seed: int) -> Tensor:
    """Fresh samples; of a model with classes, as `bldm sample` paints them."""
    cond = choose(model, [], [], None, count).cond
    return model.sampler().sample(count, steps, seed=seed, cond=cond, guidance_scale=1.0 if cond is None else guidance)


def _latents(path: Path, store: LatentStore, count: int) -> Tensor:
    latents = PackedLatents.load(path)
    if latents.shape != store.latent_shape:
        raise ValueError(f"query: {path} holds latents of {latents.shape} bits, the store of {store.latent_shape}")
    return latents.packed[:count]
