"""What the training of a denoiser takes from a store."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..autoencoder import BinaryAutoencoder
from ..store import LatentStore
from ..store.encode import fingerprint
from .conditions import CaptionFeatures


@dataclass
class Stored:
    """Packed latents on the device, and one kind of condition at most."""

    latents: Tensor
    labels: Tensor | None
    class_names: list[str] | None
    captions: CaptionFeatures | None


def take(store: LatentStore, autoencoder: BinaryAutoencoder, device: torch.device) -> Stored:
    """The whole store, checked byte by byte, in the memory of the device.

    Its column `text`, features (width,) or a sequence of them (L, width) padded with zeros, makes the model text-conditional
    (`metadata["text_encoder"]` names the encoder), else its column `label`, int64 (), class-conditional.

    Raises: ValueError, naming the store or the file, if it is damaged, not complete or of another autoencoder.
    """
    if store.latent_shape != tuple(autoencoder.latent_shape):
        raise ValueError(f"store: {store} does not hold latents of {autoencoder.latent_shape} bits, as the autoencoder makes")
    if not store.complete:
        raise ValueError(f"store: {store.path} is not complete; run the same bldm encode again")
    if store.metadata.get("autoencoder", fingerprint(autoencoder)) != fingerprint(autoencoder):
        raise ValueError(f"store: {store.path} was filled by an autoencoder with other weights")
    if damage := store.verify():
        raise ValueError(f"store: {damage[0]}")
    tensors = store.to(device).tensors
    label, text = tensors.get("label"), tensors.get("text")
    if text is not None and text.is_floating_point() and text.dim() in (2, 3):
        return Stored(tensors["packed"], None, None, _captions(text, store.metadata.get("text_encoder")))
    if label is not None and label.dim() == 1 and label.dtype == torch.int64:
        return Stored(tensors["packed"], label, store.metadata.get("class_names"), None)
    return Stored(tensors["packed"], None, None, None)


def _captions(text: Tensor, encoder: str | None) -> CaptionFeatures:
    """One caption a sample."""
    lengths = None
    if text.dim() == 3:
        there = text.ne(0).any(-1)
        text, lengths = text[there], there.sum(-1)
    number = len(text) if lengths is None else len(lengths)
    return CaptionFeatures(text, lengths, torch.arange(number), torch.ones(number, dtype=torch.int64), encoder)
