"""The denoiser's training: images are encoded once, then only packed bits are touched."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, to_float
from ..diffusion import BinaryLatentDiffusion
from ..losses import DiffusionLoss
from .loop import TrainOptions, accelerator, train


@torch.no_grad()
def encode_images(autoencoder: BinaryAutoencoder, images: Tensor, flip: bool, batch_size: int = 1000) -> Tensor:
    """Packed latents of all images (then of their mirror images with `flip`), thresholded, on the autoencoder's device."""
    device = next(autoencoder.parameters()).device
    parts = []
    for mirrored in (False, True) if flip else (False,):
        for part in images.split(batch_size):
            x = to_float(part.to(device))
            parts.append(autoencoder.encode(x.flip(-1) if mirrored else x))
    return torch.cat(parts)


def train_denoiser(
    autoencoder: Path,
    config: dict[str, Any],
    data: ImageData,
    options: TrainOptions,
    out: Path,
    *,
    schedule: str = "linear",
    num_steps: int = 256,
    prediction: str = "flip",
    label_dropout: float = 0.1,
    flip: bool = False,
    loss: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
) -> BinaryLatentDiffusion:
    """Train a denoiser on the bits of a trained autoencoder and save the whole `BinaryLatentDiffusion` to `out`.

    Args: config are further arguments of `BinaryDenoiser`, loss those of `DiffusionLoss`; label_dropout is the share of labels replaced by the
    null label, which is what guidance needs. A model is class-conditional when the data has labels.
    """
    accel = accelerator(options)
    encoder = BinaryAutoencoder.from_pretrained(autoencoder, map_location=accel.device)
    latents = encode_images(encoder, data.images, flip)
    labels = None
    if data.labels is not None:
        config = {**config, "num_classes": int(data.labels.max()) + 1}
        labels = data.labels.to(accel.device).repeat(2 if flip else 1)
    torch.manual_seed(options.seed)
    model = BinaryLatentDiffusion(
        dict(encoder._hub_mixin_config or {}),
        config,
        schedule,
        num_steps,
        prediction,
        data.class_names,  # type: ignore[call-overload]
    )
    model.autoencoder.load_state_dict(encoder.state_dict())
    criterion = DiffusionLoss(model.schedule, prediction, **(loss or {}))
    num_bits = encoder.latent_shape[-1]

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        label = None if labels is None else labels[rows]
        if label is not None and label_dropout > 0:
            dropped = torch.rand(label.shape, device=label.device) < label_dropout
            label = torch.where(dropped, model.denoiser.null_label, label)
        seed = options.seed * accel.num_processes + accel.process_index
        return criterion(trained, latents[rows], num_bits, seed=seed, step=step, label=label)

    averaged = train(model.denoiser, objective, len(latents), options, out, accel, {"config": config, **(details or {})})
    model.denoiser.load_state_dict(averaged.state_dict())
    if accel.is_main_process:
        model.save_pretrained(out)
    accel.wait_for_everyone()
    return model
