"""What a denoiser is told of each image in training: its class or one of its captions, and sometimes nothing."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import write_atomically
from ..text import TextEncoder


@dataclass
class CaptionFeatures:
    """Features of every different caption, and which of them belong to each image.

    features: float16 (U, width), or (sum of lengths, width) with `lengths` (U,) for sequences of tokens.
    index: int64, the captions of the first image, then those of the second, and so on; counts: int64 (N,), how many each has.
    """

    features: Tensor
    lengths: Tensor | None
    index: Tensor
    counts: Tensor
    encoder: str | None

    @property
    def width(self) -> int:
        return self.features.shape[-1]

    def table(self) -> Tensor:
        """(U, width), or (U, L, width), shorter captions padded with zeros."""
        if self.lengths is None:
            return self.features
        parts = self.features.split(self.lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def features_file(folder: Path, tokens: bool) -> Path:
    """Where the features of a folder's captions are kept."""
    return folder / f"text-{'tokens' if tokens else 'vectors'}.safetensors"


def caption_features(
    captions: Sequence[Sequence[str]],
    cache: Path | None = None,
    *,
    tokens: bool = False,
    encoder: str = "all-MiniLM-L6-v2",
    device: torch.device | str = "cpu",
) -> CaptionFeatures:
    """Features of the captions of each image, read from the file `cache` if it holds those of just these captions, else made by
    the text encoder and written there.

    Raises: RuntimeError where the encoder is needed and not installed, ValueError for an image without captions.
    """
    empty = [i for i, texts in enumerate(captions) if not texts]
    if empty:
        raise ValueError(f"captions: expected one an image at least, image {empty[0]} has none")
    place = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    index = torch.tensor([place[text] for texts in captions for text in texts])
    counts = torch.tensor([len(texts) for texts in captions])
    digest = hashlib.sha256(json.dumps([encoder, tokens, *place]).encode()).hexdigest()
    found = None if cache is None else _read(cache, digest)
    if found is None:
        found = _encode(list(place), TextEncoder(encoder, device), tokens)
        if cache is not None:
            stored, metadata = found, {"encoder": encoder, "sha256": digest}
            write_atomically(cache, lambda name: save_file(stored, name, metadata=metadata))
    return CaptionFeatures(found["features"], found.get("lengths"), index, counts, encoder)


def _encode(texts: list[str], encoder: TextEncoder, tokens: bool) -> dict[str, Tensor]:
    parts, lengths = [], []
    for first in range(0, len(texts), 1024):
        part = encoder.encode(texts[first : first + 1024], tokens=tokens)
        if tokens:
            there = part.ne(0).any(-1)
            lengths.append(there.sum(-1).cpu())
            part = part[there]
        parts.append(part.half().cpu())
    found = {"features": torch.cat(parts)}
    return {**found, "lengths": torch.cat(lengths)} if tokens else found


def _read(path: Path, digest: str) -> dict[str, Tensor] | None:
    """The tensors of a cache of these very captions, or None."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("sha256") != digest:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"captions: {path} is truncated or not safetensors ({error}); delete it to have it made anew") from None


class Labels:
    """Classes int64 (N,), a share of them replaced by the null label."""

    def __init__(self, labels: Tensor, null_label: int, dropout: float):
        self.labels, self.null_label, self.dropout = labels, null_label, dropout

    def __call__(self, rows: Tensor) -> Tensor:
        label = self.labels[rows]
        if self.dropout > 0:
            label = label.masked_fill(_chosen(rows, self.dropout), self.null_label)
        return label

    def examples(self, count: int) -> Tensor:
        """So many labels, of all classes."""
        return torch.arange(count, device=self.labels.device) * self.null_label // count


class Captions:
    """One caption of each image at random, as features; a share of them replaced by zeros, which mean no text."""

    def __init__(self, captions: CaptionFeatures, dropout: float, device: torch.device):
        self.features, self.index = captions.table().to(device), captions.index.to(device)
        self.counts = captions.counts.to(device)
        self.first, self.dropout = self.counts.cumsum(0) - self.counts, dropout

    def __call__(self, rows: Tensor) -> Tensor:
        # in float64: a float32 just under 1 times the count could round up to it
        place = (torch.rand(rows.shape, dtype=torch.float64, device=rows.device) * self.counts[rows]).long()
        text = self.features[self.index[self.first[rows] + place]].float()
        if self.dropout > 0:
            text = text.masked_fill(_chosen(rows, self.dropout).view(-1, *[1] * (text.dim() - 1)), 0.0)
        return text

    def examples(self, count: int) -> Tensor:
        """Features of so many captions, of images from all over the data."""
        rows = torch.arange(count, device=self.first.device) * len(self.first) // count
        return self.features[self.index[self.first[rows]]].float()


def _chosen(rows: Tensor, share: float) -> Tensor:
    return torch.rand(rows.shape, device=rows.device) < share
