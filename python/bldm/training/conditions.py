"""What a denoiser is told of each image in training: its class or one of its captions, and sometimes nothing."""

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
    """Features of the captions of each image. The file `cache` keeps them: only captions that it lacks are encoded, and added.

    Raises: RuntimeError where the encoder is needed but not installed, ValueError for an image without captions, a broken cache.
    """
    empty = [i for i, texts in enumerate(captions) if not texts]
    if empty:
        raise ValueError(f"captions: expected one an image at least, image {empty[0]} has none")
    place = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    known = {} if cache is None or not cache.is_file() else _read(cache, encoder, tokens)
    missing = [text for text in place if text not in known]
    if missing:
        known |= _encode(missing, TextEncoder(encoder, device), tokens)
        if cache is not None:
            _write(cache, encoder, tokens, known)
    index = torch.tensor([place[text] for texts in captions for text in texts])
    counts = torch.tensor([len(texts) for texts in captions])
    return CaptionFeatures(*_stacked([known[text] for text in place], tokens), index, counts, encoder)


def _encode(texts: list[str], encoder: TextEncoder, tokens: bool) -> dict[str, Tensor]:
    """Each text's features, float16 (width,) or (L, width)."""
    found: dict[str, Tensor] = {}
    for first in range(0, len(texts), 1024):
        part = texts[first : first + 1024]
        rows = encoder.encode(part, tokens=tokens).half().cpu()
        found |= {text: row[row.ne(0).any(-1)] if tokens else row for text, row in zip(part, rows, strict=True)}
    return found


def _stacked(features: list[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
    """(U, width) and None, or (sum of lengths, width) and the lengths."""
    if not tokens:
        return torch.stack(features), None
    return torch.cat(features), torch.tensor([len(row) for row in features])


def _write(path: Path, encoder: str, tokens: bool, known: dict[str, Tensor]) -> None:
    features, lengths = _stacked(list(known.values()), tokens)
    stored = {"features": features} if lengths is None else {"features": features, "lengths": lengths}
    metadata = {"encoder": encoder, "texts": json.dumps(list(known))}
    write_atomically(path, lambda name: save_file(stored, name, metadata=metadata))


def _read(path: Path, encoder: str, tokens: bool) -> dict[str, Tensor]:
    """The features that a cache holds by text; none if they are another encoder's."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata["encoder"] != encoder:
                return {}
            features = file.get_tensor("features")
            rows = features.split(file.get_tensor("lengths").tolist()) if tokens else features.unbind()
            return dict(zip(json.loads(metadata["texts"]), rows, strict=True))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"captions: {path} is truncated or no cache of features ({error}); delete it to have it made anew"
        ) from None


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
