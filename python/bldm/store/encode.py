"""Filling a store with the latents of a data set."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bldm_kernels import checks

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, PictureFolder, to_float
from .layout import INDEX
from .reader import LatentStore


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a model's weights: which autoencoder made these bits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _data_fingerprint(data: ImageData | PictureFolder) -> str:
    """SHA-256 of the images, or of the names of the files."""
    if isinstance(data, ImageData):
        return hashlib.sha256(data.images.contiguous().numpy().data).hexdigest()
    return hashlib.sha256("\n".join(f"{file.parent.name}/{file.name}" for file in data.files).encode()).hexdigest()


def _spans(total: int, batch_size: int, first: int, mirrored: bool) -> Iterator[tuple[int, int, bool]]:
    """Batches (start, stop, mirrored) on a grid that does not depend on `first`, from the batch that holds sample `first` on."""
    for turn in (False, True) if mirrored else (False,):
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            if stop + turn * total > first:
                yield start, stop, turn


@torch.no_grad()
def encode_dataset(
    autoencoder: BinaryAutoencoder,
    data: ImageData | PictureFolder,
    out: str | Path,
    *,
    batch_size: int = 256,
    mirrored: bool = False,
    samples_per_shard: int | None = None,
    metadata: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LatentStore:
    """Write the thresholded latents of all images, and their labels if there are any, to a store.

    Called again after an interruption it goes on from the last whole shard, and the store becomes the same as without one, byte
    for byte (on a device whose convolutions are deterministic). A complete store of the same images and weights is left as it is.

    Args:
        autoencoder: on the device that is to do the work.
        data: images of the autoencoder's size and channels.
        batch_size: images at once.
        mirrored: then the mirror images of all of them too.
        samples_per_shard: as in `LatentStore.writer`.
        metadata: more to say about the store; fingerprints of weights and data and the names of the classes are there anyhow.
        progress: called with the number of samples encoded so far, those that were there included.

    Raises: ValueError if `out` holds a store of other images, weights or options.
    """
    checks.integer("batch_size", batch_size, 1, 2**40)
    device = next(autoencoder.parameters()).device
    expected = (autoencoder.in_channels, autoencoder.image_size, autoencoder.image_size)
    found = tuple(data.read(0, 1).shape[1:])
    if found != expected:
        raise ValueError(f"data: expected images of shape {expected} for this autoencoder, got {found}")
    about = {
        **(metadata or {}),
        "autoencoder": fingerprint(autoencoder),
        "data": _data_fingerprint(data),
        "mirrored": mirrored,
        "samples": len(data) * (2 if mirrored else 1),
        "class_names": data.class_names,
    }
    labels = data.labels
    columns: dict[str, Any] = {} if labels is None else {"label": ((), torch.int64)}
    if (done := _complete(Path(out), about)) is not None:
        if progress is not None:
            progress(len(done))
        return done
    with LatentStore.writer(
        out, autoencoder.latent_shape, columns, samples_per_shard=samples_per_shard, metadata=about
    ) as writer:
        first = writer.committed

        def append(packed: Tensor, start: int, stop: int, turn: bool) -> None:
            skip = max(first - turn * len(data) - start, 0)
            more = {} if labels is None else {"label": labels[start + skip : stop]}
            writer.append(packed[skip:], **more)
            if progress is not None:
                progress(turn * len(data) + stop)

        if progress is not None:
            progress(first)
        waiting: tuple[Tensor, int, int, bool] | None = None
        for start, stop, turn in _spans(len(data), batch_size, first, mirrored):
            images = to_float(data.read(start, stop).to(device))
            packed = autoencoder.encode(images.flip(-1) if turn else images)
            if waiting is not None:  # one batch late: pictures are read while a GPU works
                append(*waiting)
            waiting = (packed, start, stop, turn)
        if waiting is not None:
            append(*waiting)
    return LatentStore(out)


def _complete(path: Path, about: dict[str, Any]) -> LatentStore | None:
    """The store, if it is there, complete, whole, and of these images and weights."""
    if not (path / INDEX).is_file():
        return None
    store = LatentStore(path)
    same = store.complete and store.metadata == about and not store.damage
    return store if same else None
