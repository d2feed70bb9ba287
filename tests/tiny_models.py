"""Models small enough to make in a test: random weights, the real classes."""

from typing import TypeVar

import bldm
import torch

Model = TypeVar("Model", bound=torch.nn.Module)
CLASS_NAMES = ["Shirt", "Ankle boot", "Bag"]


def tiny_denoiser(num_classes: int | None = 3, seed: int = 0) -> bldm.BinaryDenoiser:
    """For latents of 4 positions x 8 bits, 16 steps."""
    torch.manual_seed(seed)
    model = bldm.BinaryDenoiser(
        num_positions=4, num_bits=8, num_steps=16, num_classes=num_classes, width=16, depth=1, num_heads=2
    )
    return _randomised(model)


def tiny_autoencoder(seed: int = 0) -> bldm.BinaryAutoencoder:
    torch.manual_seed(seed)
    return _randomised(bldm.BinaryAutoencoder(image_channels=1, image_size=28, width=8, num_bits=8))


def tiny_model(num_classes: int | None = 3, seed: int = 0) -> bldm.BinaryLatentDiffusion:
    torch.manual_seed(seed)
    names = None if num_classes is None else CLASS_NAMES[:num_classes]
    model = bldm.BinaryLatentDiffusion(
        autoencoder={"image_channels": 1, "image_size": 28, "width": 8, "num_bits": 8},
        denoiser={"width": 16, "depth": 1, "num_heads": 2, "num_classes": num_classes},
        num_steps=16,
        class_names=names,
    )
    return _randomised(model)


def _randomised(model: Model) -> Model:
    """No zero-initialised output layer: the logits must depend on the input for a test to mean anything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model.eval()
