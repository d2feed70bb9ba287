"""The autoencoder's objective: reconstruction through bits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autoencoder import BinaryAutoencoder
from ..data import ImageData, to_float
from .augment import augment
from .loop import TrainOptions, accelerator, train


def code_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in bits of each channel's average over the batch: 1 when every bit of the code is used."""
    p = torch.sigmoid(logits.float()).mean((0, 2, 3)).clamp(1e-6, 1 - 1e-6)
    return -(p * p.log2() + (1 - p) * (1 - p).log2()).mean()


def train_autoencoder(
    config: dict[str, Any],
    data: ImageData,
    options: TrainOptions,
    out: Path,
    *,
    mse_weight: float = 1.0,
    entropy_weight: float = 0.0,
    flip: bool = False,
    augmented: bool = False,
    details: dict[str, Any] | None = None,
) -> BinaryAutoencoder:
    """Train a `BinaryAutoencoder(**config)` on images, L1 + mse_weight MSE - entropy_weight code entropy; saves it to `out`.

    `flip` mirrors half of the images of a batch, `augmented` moves and scales them a little.
    """
    accel = accelerator()
    torch.manual_seed(options.seed)
    model = BinaryAutoencoder(**config)
    images = data.images.to(accel.device)

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        x = to_float(images[rows])
        if augmented:
            x = augment(x)
        if flip:
            x = torch.cat([x[: len(x) // 2], x[len(x) // 2 :].flip(-1)])
        decoded, logits = trained(x, seed=options.seed * accel.num_processes + accel.process_index, step=step)
        l1, mse = F.l1_loss(decoded.float(), x), F.mse_loss(decoded.float(), x)
        entropy = code_entropy(logits)
        loss = l1 + mse_weight * mse - entropy_weight * entropy
        return {"loss": loss, "l1": l1.detach(), "mse": mse.detach(), "code_entropy": entropy.detach()}

    averaged = train(model, objective, len(data), options, out, accel, {"config": config, **(details or {})})
    assert isinstance(averaged, BinaryAutoencoder)
    if accel.is_main_process:
        averaged.save_pretrained(out)
    accel.wait_for_everyone()
    return averaged
