"""Filling a store with the latents of a data set."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bldm_kernels import checks

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, PictureFolder, to_float
from .layout import INDEX
from .reader import LatentStore

if TYPE_CHECKING:
    from ..training.conditions import CaptionFeatures


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


def _text_fingerprint(captions: "CaptionFeatures") -> str:
    """SHA-256 of the features and of whose they are."""
    digest = hashlib.sha256()
    for tensor in (captions.features, captions.lengths, captions.index, captions.counts):
        if tensor is not None:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _spans(places: Tensor, batch_size: int, first: int, mirrored: bool) -> Iterator[tuple[int, int, bool]]:
    """Batches (start, stop, mirrored) of images on a grid that does not depend on `first`, from the batch that holds sample
    `first` on; the samples of image i are places[i] .. places[i + 1]."""
    images, total = len(places) - 1, int(places[-1])
    for turn in (False, True) if mirrored else (False,):
        for start in range(0, images, batch_size):
            stop = min(start + batch_size, images)
            if places[stop] + turn * total > first:
                yield start, stop, turn


@torch.no_grad()
def encode_dataset(
    autoencoder: BinaryAutoencoder,
    data: ImageData | PictureFolder,
    out: str | Path,
    *,
    batch_size: int = 256,
    mirrored: bool = False,
    captions: "CaptionFeatures | None" = None,
    samples_per_shard: int | None = None,
    metadata: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LatentStore:
    """Write the thresholded latents of all images to a store, with their labels if there are any, or with their captions.

    Called again after an interruption it goes on from the last whole shard, and the store becomes the same as without one, byte
    for byte (on a device whose convolutions are deterministic). A complete store of the same images and weights is left as it is.

    Args:
        autoencoder: on the device that is to do the work.
        data: images of the autoencoder's size and channels.
        batch_size: images at once.
        mirrored: then the mirror images of all of them too.
        captions: features of the images' captions. Then there is a sample for every caption of an image, with the column `text`,
            float16 (width,), or (L, width) padded with zeros.
        samples_per_shard: as in `LatentStore.writer`.
        metadata: more to say about the store; fingerprints of weights and data and the names of the classes are there anyhow.
        progress: called with the number of samples encoded so far, those that were there included.

    Raises: ValueError for captions of another number of images, or if `out` holds a store of other images, weights or options.
    """
    checks.integer("batch_size", batch_size, 1, 2**40)
    device = next(autoencoder.parameters()).device
    expected = (autoencoder.in_channels, autoencoder.image_size, autoencoder.image_size)
    found = tuple(data.read(0, 1).shape[1:])
    if found != expected:
        raise ValueError(f"data: expected images of shape {expected} for this autoencoder, got {found}")
    if captions is not None and len(captions.counts) != len(data):
        raise ValueError(f"captions: expected those of {len(data)} images, got those of {len(captions.counts)}")
    counts = torch.ones(len(data), dtype=torch.int64) if captions is None else captions.counts
    places = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(places[-1])
    about = {
        **(metadata or {}),
        "autoencoder": fingerprint(autoencoder),
        "data": _data_fingerprint(data),
        "mirrored": mirrored,
        "samples": total * (2 if mirrored else 1),
        "class_names": data.class_names,
    }
    known: dict[str, Tensor] = {} if data.labels is None else {"label": data.labels.repeat_interleave(counts)}
    columns: dict[str, Any] = {name: (value.shape[1:], value.dtype) for name, value in known.items()}
    if captions is not None:
        table = captions.table()
        columns["text"] = (table.shape[1:], table.dtype)
        about |= {"text_encoder": captions.encoder, "text": _text_fingerprint(captions)}
    if (done := _complete(Path(out), about)) is not None:
        if progress is not None:
            progress(len(done))
        return done
    with LatentStore.writer(
        out, autoencoder.latent_shape, columns, samples_per_shard=samples_per_shard, metadata=about
    ) as writer:
        first = writer.committed

        def append(packed: Tensor, start: int, stop: int, turn: bool) -> None:
            begin, end = int(places[start]), int(places[stop])
            skip = max(first - turn * total - begin, 0)
            rows = slice(begin + skip, end)
            more = {name: value[rows] for name, value in known.items()}
            if captions is not None:
                more["text"] = table[captions.index[rows]]
            writer.append(packed.cpu().repeat_interleave(counts[start:stop], dim=0)[skip:], **more)
            if progress is not None:
                progress(turn * total + end)

        if progress is not None:
            progress(first)
        waiting: tuple[Tensor, int, int, bool] | None = None
        for start, stop, turn in _spans(places, batch_size, first, mirrored):
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
