"""The autoencoder's objective: reconstruction through bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, to_float
from ..grid import draw_grid
from .adversary import Adversary
from .augment import augment
from .loop import accelerator, train
from .options import TrainOptions

SHOWN = 16  # images of a sample grid
Perceptual = Callable[[Tensor, Tensor], Tensor]


def code_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in bits of each channel's average over the batch: 1 when every bit of the code is used."""
    p = torch.sigmoid(logits.float()).mean((0, 2, 3)).clamp(1e-6, 1 - 1e-6)
    return -(p * p.log2() + (1 - p) * (1 - p).log2()).mean()


def lpips() -> nn.Module:
    """LPIPS with VGG features (Zhang et al. 2018): distance of two batches of images (B, 3, H, W) in [-1, 1]."""
    try:
        from lpips import LPIPS
    except ImportError:
        raise RuntimeError("perceptual: LPIPS needs a package: pip install 'bldm-kernels[lpips]'") from None
    return LPIPS(net="vgg", verbose=False)


def train_autoencoder(
    config: dict[str, Any],
    data: ImageData,
    options: TrainOptions,
    out: Path,
    *,
    mse_weight: float = 1.0,
    entropy_weight: float = 0.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    gan_weight: float = 0.0,
    gan_start: int = 0,
    flip: bool = False,
    augmented: bool = False,
    details: dict[str, Any] | None = None,
) -> BinaryAutoencoder:
    """Train a `BinaryAutoencoder(**config)` on images and save the averaged one to `out`.

    loss = L1 + mse_weight MSE + perceptual_weight perceptual + gan_weight w GAN - entropy_weight code entropy

    Args:
        perceptual: distance of two batches of images (B, 3, H, W) in [-1, 1], for example `lpips()`; grey images are repeated.
        gan_weight: of the hinge loss of a patch discriminator, times the adaptive weight w of Esser et al. 2021; 0: none.
        gan_start: step from which on the discriminator takes part.
        flip: mirror half of the images of a batch.
        augmented: move and scale them a little.

    Raises: TypeError, ValueError naming the argument.
    """
    for name, value in (("gan_weight", gan_weight), ("perceptual_weight", perceptual_weight)):
        if bk.checks.real(name, value) < 0:
            raise ValueError(f"{name}: expected >= 0, got {value}")
    bk.checks.integer("gan_start", gan_start, 0, 2**62)
    if gan_weight and options.fsdp:
        raise ValueError("fsdp: not together with gan_weight, whose adaptive weight needs the last layer's gradient alone")
    accel = accelerator()
    torch.manual_seed(options.seed)
    model = BinaryAutoencoder(**config)
    adversary = None
    if gan_weight:
        adversary = Adversary(model.image_size, model.in_channels, options, accel, start=gan_start, weight=gan_weight)
    if isinstance(perceptual, nn.Module):
        perceptual = perceptual.to(accel.device).eval().requires_grad_(False)
    images = data.images.to(accel.device)

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        x = to_float(images[rows])
        if augmented:
            x = augment(x)
        if flip:
            x = torch.cat([x[: len(x) // 2], x[len(x) // 2 :].flip(-1)])
        dtype = next(trained.parameters()).dtype
        decoded, logits = trained(x.to(dtype), seed=options.seed * accel.num_processes + accel.process_index, step=step)
        decoded = decoded.float()
        terms = {"l1": F.l1_loss(decoded, x), "mse": F.mse_loss(decoded, x)}
        reconstruction = terms["l1"] + mse_weight * terms["mse"]
        if perceptual is not None:
            terms["perceptual"] = perceptual(x.expand(-1, 3, -1, -1), decoded.expand(-1, 3, -1, -1)).mean()
            reconstruction = reconstruction + perceptual_weight * terms["perceptual"]
        terms["code_entropy"] = code_entropy(logits)
        loss = reconstruction - entropy_weight * terms["code_entropy"]
        if adversary is not None:
            last = trained.decoder[-1].weight  # type: ignore[index, union-attr]
            terms |= adversary.generator_loss(x, decoded, reconstruction, last, step)
            loss = loss + terms.get("gan", 0.0)
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def draw(averaged: nn.Module) -> Image.Image:
        """Images, each row above their reconstructions."""
        x = to_float(images[:SHOWN])
        return draw_grid(torch.cat([x, averaged.decode(averaged.encode(x))]), columns=len(x))  # type: ignore[operator]

    kept = {"config": config, **(details or {})}
    averaged = train(model, objective, len(data), options, out, accel, kept, partner=adversary, draw=torch.no_grad()(draw))
    assert isinstance(averaged, BinaryAutoencoder)
    if accel.is_main_process:
        averaged.save_pretrained(out)
    accel.wait_for_everyone()
    return averaged
