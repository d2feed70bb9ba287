"""Models small enough to make in a test: random weights, a few classes."""

from typing import Any, TypeVar

import bldm
import torch

Model = TypeVar("Model", bound=torch.nn.Module)
CLASS_NAMES = ["Shirt", "Ankle boot", "Bag"]
AUTOENCODER: dict[str, Any] = {"image_size": 28, "in_channels": 1, "num_bits": 8, "base_channels": 8}
DENOISER: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2}


def tiny_autoencoder() -> bldm.BinaryAutoencoder:
    """Images of 28 x 28 pixels, latents (7, 7, 8)."""
    torch.manual_seed(0)
    return _randomised(bldm.BinaryAutoencoder(**AUTOENCODER))


def tiny_denoiser() -> bldm.BinaryDenoiser:
    """Latents of 4 positions x 8 bits, 16 steps, three classes."""
    torch.manual_seed(0)
    return _randomised(bldm.BinaryDenoiser(num_positions=4, num_bits=8, num_steps=16, num_classes=3, **DENOISER))


def tiny_model(num_classes: int | None = 3) -> bldm.BinaryLatentDiffusion:
    torch.manual_seed(0)
    model = bldm.BinaryLatentDiffusion(
        autoencoder=AUTOENCODER,
        denoiser={**DENOISER, "num_classes": num_classes},
        num_steps=16,
        class_names=None if num_classes is None else CLASS_NAMES[:num_classes],
    )
    return _randomised(model)


def _randomised(model: Model) -> Model:
    """Nothing zero: the answer must depend on every input for a test to mean anything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model.eval()
