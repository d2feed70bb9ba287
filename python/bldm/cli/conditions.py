"""What `bldm sample` is told to paint: classes, texts or their features, and what of an image stays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data import load_picture, to_float
from ..diffusion import BinaryLatentDiffusion
from ..inpaint import inpainting_bits


@dataclass
class Wanted:
    """The condition of each sample on the CPU, and what to write under it; None and None for no condition."""

    cond: Tensor | None
    captions: list[str] | None


def choose(model: BinaryLatentDiffusion, labels: list[str], texts: list[str], features: Path | None, num_samples: int) -> Wanted:
    """The conditions asked for, in equal shares of the samples, in order; a class-conditional model paints all its classes.

    Raises: ValueError for a condition that this model does not take, or several kinds at once.
    """
    denoiser = model.denoiser
    if sum((bool(labels), bool(texts), features is not None)) > 1:
        raise ValueError("label, text, text_features: expected one of them at most")
    if (texts or features is not None) and denoiser.text_width is None:
        takes = "classes: see --label" if denoiser.num_classes else "no condition"
        raise ValueError(f"{'text' if texts else 'text_features'}: this model takes no text, but {takes}")
    if labels and denoiser.num_classes is None:
        raise ValueError(f"label: this model has no classes{', but takes --text' if denoiser.text_width else ''}")
    if texts:
        if model.text_encoder is None:
            raise ValueError("text: this model does not say which text encoder it was trained with; give --text-features")
        cond, names = model.encode_text(texts).cpu(), texts
    elif features is not None:
        cond = read_features(features, denoiser.text_width or 0, denoiser.cross_attention)
        names = [f"text {i}" for i in range(len(cond))]
    elif denoiser.num_classes is not None:
        cond, names = _classes(model, denoiser.num_classes, labels)
    else:
        return Wanted(None, None)
    share = [i * len(cond) // num_samples for i in range(num_samples)]
    return Wanted(cond[share], [names[i] for i in share])


def _classes(model: BinaryLatentDiffusion, num_classes: int, labels: list[str]) -> tuple[Tensor, list[str]]:
    names = [*(model.class_names or []), *map(str, range(len(model.class_names or []), num_classes))]
    known = {name.lower(): i for i, name in enumerate(model.class_names or [])}
    known |= {str(i): i for i in range(num_classes)}
    chosen = []
    for name in labels or map(str, range(num_classes)):
        if name.lower() not in known:
            raise ValueError(f"label: {name!r} is not a class of this model; expected one of {', '.join(known)}")
        chosen.append(known[name.lower()])
    return torch.tensor(chosen, dtype=torch.int64), [names[i] for i in chosen]


def read_features(path: Path, width: int, sequence: bool) -> Tensor:
    """Text features float32 (K, width), or (K, L, width): an .npy array, or a safetensors file with a tensor "features"."""
    if not path.is_file():
        raise FileNotFoundError(f"text_features: no file {path}")
    try:
        found = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else load_file(path)["features"]
    except (SafetensorError, KeyError, ValueError, OSError, TypeError) as error:
        raise ValueError(f"text_features: {path} is no .npy array and no safetensors file with 'features': {error}") from None
    expected = f"(texts{', tokens' if sequence else ''}, {width})"
    if found.dim() != 2 + sequence or found.shape[-1] != width or not len(found) or not found.is_floating_point():
        raise ValueError(f"text_features: expected floating {expected}, got {found.dtype} {tuple(found.shape)} in {path}")
    return found.float()


def inpainting(
    model: BinaryLatentDiffusion, image: Path | None, mask: Path | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(keep_mask, keep_bits) of one latent for all samples, or None and None without an image."""
    if (image is None) != (mask is None):
        raise ValueError("inpaint, mask: expected both or neither")
    if image is None or mask is None:
        return None, None
    channels, size = model.autoencoder.in_channels, model.autoencoder.image_size
    picture = load_picture(image, size)
    if channels == 1:  # ITU-R 601 luma, as Pillow's
        picture = (picture.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).round()
    if len(picture) != channels:
        raise ValueError(f"inpaint: expected a model of 1 or 3 channels, this one has {channels}")
    repaint = load_picture(mask, size, Image.Resampling.BOX).float().mean(0) >= 128
    if not repaint.any():
        raise ValueError(f"mask: {mask} has no white pixel: there is nothing to repaint")
    return inpainting_bits(model.autoencoder, to_float(picture)[None].to(device), repaint.to(device))
