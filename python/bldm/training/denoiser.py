"""The denoiser's training: images are encoded once, then only packed bits are touched."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import bldm_kernels as bk

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, to_float
from ..denoiser import BinaryDenoiser
from ..diffusion import BinaryLatentDiffusion
from ..grid import draw_grid
from ..losses import DiffusionLoss
from ..sampling import FastSampler
from ..store import LatentStore
from .augment import augment
from .conditions import CaptionFeatures, Captions, Labels
from .loop import accelerator, train
from .options import TrainOptions
from .stored import take

SHOWN, SHOWN_STEPS = 16, 16  # of a sample grid


@torch.no_grad()
def encode_images(
    autoencoder: BinaryAutoencoder, images: Tensor, flip: bool, copies: int = 0, seed: int = 0, batch_size: int = 1000
) -> Tensor:
    """Packed latents of all images (then of their mirror images with `flip`), thresholded, on the autoencoder's device; then
    the same again `copies` times, each image moved and scaled a little at random."""
    device = next(autoencoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for copy in range(copies + 1):
        for mirrored in (False, True) if flip else (False,):
            for part in images.split(batch_size):
                x = to_float(part.to(device))
                x = augment(x, generator) if copy else x
                parts.append(autoencoder.encode(x.flip(-1) if mirrored else x))
    return torch.cat(parts)


def train_denoiser(
    autoencoder: Path,
    config: dict[str, Any],
    data: ImageData | LatentStore,
    options: TrainOptions,
    out: Path,
    *,
    schedule: str = "linear",
    num_steps: int = 256,
    prediction: str = "flip",
    label_dropout: float = 0.1,
    flip: bool = False,
    copies: int = 0,
    captions: CaptionFeatures | None = None,
    loss: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
) -> BinaryLatentDiffusion:
    """Train a denoiser on the bits of a trained autoencoder and save the whole `BinaryLatentDiffusion` to `out`.

    Args:
        autoencoder: its folder.
        data: images, which are encoded first, or a store that the same autoencoder filled, which is then held on the device, with
            the conditions that `stored.take` finds in it.
        config: further arguments of `BinaryDenoiser`; the model is class-conditional when the data has labels.
        label_dropout: share of labels or captions left out, in 0..1, which is what guidance needs.
        flip: train on the latents of the mirror images too (of a store: `bldm encode --flip`).
        copies: and on those of so many copies of each image, moved and scaled a little.
        captions: features of the images' captions for a text-conditional model: as one token, or with lengths by cross attention.
        loss: arguments of `DiffusionLoss`.
    """
    if not 0 <= bk.checks.real("label_dropout", label_dropout) <= 1:
        raise ValueError(f"label_dropout: expected 0 <= label_dropout <= 1, got {label_dropout}")
    accel = accelerator()
    bk.checks.integer("copies", copies, 0, 10**6)
    if captions is not None and len(captions.counts) != len(data):
        raise ValueError(f"captions: expected those of {len(data)} images, got those of {len(captions.counts)}")
    encoder = BinaryAutoencoder.from_pretrained(autoencoder, map_location=accel.device)
    if isinstance(data, LatentStore):
        if flip or copies:
            raise ValueError("flip, copies: the latents of a store are what they are; encode mirror images: bldm encode --flip")
        stored = take(data, encoder, accel.device)
        latents, labels, class_names, captions = stored.latents, stored.labels, stored.class_names, captions or stored.captions
    else:
        latents = encode_images(encoder, data.images, flip, copies, options.seed)
        labels, class_names = data.labels, data.class_names
    condition: Labels | Captions | None = None
    if captions is not None:
        config = {**config, "text_width": captions.width, "cross_attention": captions.lengths is not None}
        condition = Captions(captions, label_dropout, accel.device)
    elif labels is not None:
        num_classes = int(labels.max()) + 1 if class_names is None else len(class_names)
        config = {**config, "num_classes": num_classes}
        condition = Labels(labels.to(accel.device), num_classes, label_dropout)
    torch.manual_seed(options.seed)
    known: Any = encoder._hub_mixin_config
    names, text_encoder = (class_names, None) if captions is None else (None, captions.encoder)
    model = BinaryLatentDiffusion(dict(known), config, schedule, num_steps, prediction, names, text_encoder)
    model.autoencoder.load_state_dict(encoder.state_dict())
    criterion = DiffusionLoss(model.schedule, prediction, **(loss or {}))
    num_bits = encoder.latent_shape[-1]

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        label = None if condition is None else condition(rows % len(data))  # copies and mirror images come after
        seed = options.seed * accel.num_processes + accel.process_index
        return criterion(trained, latents[rows], num_bits, seed=seed, step=step, label=label)

    def draw(averaged: nn.Module) -> Image.Image:
        """Samples of the averaged denoiser, of all classes or of captions from all over the data."""
        examples = None if condition is None else condition.examples(SHOWN)
        sampler = FastSampler(averaged, model.schedule, latent_shape=model.latent_shape, prediction=prediction, graph=False)
        return draw_grid(encoder.decode(sampler.sample(SHOWN, min(SHOWN_STEPS, num_steps), cond=examples)))

    kept = {"config": config, **(details or {})}
    averaged = train(model.denoiser, objective, len(latents), options, out, accel, kept, draw=torch.no_grad()(draw))
    assert isinstance(averaged, BinaryDenoiser)
    model.denoiser = averaged
    if accel.is_main_process:
        model.save_pretrained(out)
    accel.wait_for_everyone()
    return model
