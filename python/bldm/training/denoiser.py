"""The denoiser's training: images are encoded once, then only packed bits are touched."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

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

    Args:
        autoencoder: its folder.
        config: further arguments of `BinaryDenoiser`; the model is class-conditional when the data has labels.
        label_dropout: share of labels replaced by the null label, in 0..1, which is what guidance needs.
        flip: train on the latents of the mirror images too.
        loss: arguments of `DiffusionLoss`.
    """
    if not 0 <= bk.checks.real("label_dropout", label_dropout) <= 1:
        raise ValueError(f"label_dropout: expected 0 <= label_dropout <= 1, got {label_dropout}")
    accel = accelerator()
    encoder = BinaryAutoencoder.from_pretrained(autoencoder, map_location=accel.device)
    latents = encode_images(encoder, data.images, flip)
    labels, num_classes = None, 0
    if data.labels is not None:
        num_classes = int(data.labels.max()) + 1 if data.class_names is None else len(data.class_names)
        config = {**config, "num_classes": num_classes}
        labels = data.labels.to(accel.device).repeat(2 if flip else 1)
    torch.manual_seed(options.seed)
    known: Any = encoder._hub_mixin_config
    model = BinaryLatentDiffusion(dict(known), config, schedule, num_steps, prediction, data.class_names)
    model.autoencoder.load_state_dict(encoder.state_dict())
    criterion = DiffusionLoss(model.schedule, prediction, **(loss or {}))
    num_bits = encoder.latent_shape[-1]

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        label = None if labels is None else labels[rows]
        if label is not None and label_dropout > 0:
            dropped = torch.rand(label.shape, device=label.device) < label_dropout
            label = label.masked_fill(dropped, num_classes)  # the null label
        seed = options.seed * accel.num_processes + accel.process_index
        return criterion(trained, latents[rows], num_bits, seed=seed, step=step, label=label)

    averaged = train(model.denoiser, objective, len(latents), options, out, accel, {"config": config, **(details or {})})
    model.denoiser.load_state_dict(averaged.state_dict())
    if accel.is_main_process:
        model.save_pretrained(out)
    accel.wait_for_everyone()
    return model
