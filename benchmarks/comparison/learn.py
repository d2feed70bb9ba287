"""Training of a method in two stages, each for so many minutes in all, however often it is interrupted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bldm
import torch
from autoencoders import CodeAutoencoder, GaussianAutoencoder
from bldm.checkpoint import CONFIG
from bldm.data import ImageData, load_images, to_float
from bldm.training.augment import augment
from bldm.training.autoencoder import train_autoencoder
from bldm.training.conditions import CaptionFeatures, Captions, Labels, caption_features, features_file
from bldm.training.denoiser import encode_images, train_denoiser
from bldm.training.loop import CHECKPOINT, accelerator, train
from bldm.training.options import TrainOptions
from diffusions import GaussianDiffusion, MaskedTokens
from settings import Setting
from torch import Tensor, nn
from torch.nn import functional as F

Model = bldm.BinaryLatentDiffusion | MaskedTokens | GaussianDiffusion
CLASSES: dict[str, type[Any]] = {"binary": bldm.BinaryLatentDiffusion, "tokens": MaskedTokens, "gaussian": GaussianDiffusion}
AUTOENCODERS: dict[str, type[Any]] = {
    "binary": bldm.BinaryAutoencoder,
    "tokens": CodeAutoencoder,
    "gaussian": GaussianAutoencoder,
}
DROPPED = 0.1  # share of labels and captions left out, for guidance


def read(folder: Path, setting: Setting, split: str = "train") -> tuple[ImageData, CaptionFeatures | None]:
    """Images, padded to the setting's size, with labels; or with captions and the features that are kept beside them."""
    data = load_images(folder, split, setting.image_size - 2 * setting.pad)
    data.images = F.pad(data.images, (setting.pad,) * 4)
    if data.captions is None:
        return data, None
    return data, caption_features(data.captions, features_file(folder / split, tokens=False))


def options(setting: Setting, stage: int, minutes: float, steps: int | None) -> TrainOptions:
    """A constant rate and an average: runs of equal time need not know how many steps they will make."""
    gpu = torch.cuda.is_available()
    return TrainOptions(
        steps=steps or 10**7,
        batch_size=(setting.autoencoder_batch, setting.batch)[stage],
        lr=(setting.autoencoder_lr, setting.lr)[stage],
        lr_schedule="constant",
        mixed_precision="bf16" if gpu else "no",
        compile=gpu and stage == 1,
        save_every=1000,
        max_minutes=minutes,
        resume=True,
    )


def stage(out: Path, kind: type[Any], run: TrainOptions, begin: Callable[[TrainOptions], Any]) -> Any:
    """`begin` unless `out` holds the finished model; what was trained already counts."""
    if not (out / CONFIG).is_file():
        assert run.max_minutes is not None
        done = torch.load(out / CHECKPOINT, map_location="cpu")["minutes"] if (out / CHECKPOINT).is_file() else 0.0
        begin(replace(run, max_minutes=max(run.max_minutes - done, 0.01)))
    return kind.from_pretrained(out, map_location="cuda" if torch.cuda.is_available() else "cpu")


def learn(
    method: str, setting: Setting, data: ImageData, captions: CaptionFeatures | None, out: Path, steps: int | None = None
) -> Any:
    """The trained model of a method; `out` keeps both stages. steps: of either stage at most."""
    first, second = out / "autoencoder", out / "model"

    def compress(run: TrainOptions) -> None:
        config = setting.autoencoder(method)
        if method == "binary":
            train_autoencoder(config, data, run, first, entropy_weight=0.01, flip=True, augmented=setting.augmented)
        else:
            train_opponents_autoencoder(AUTOENCODERS[method](**config), data, run, first, setting.augmented)

    def diffuse(run: TrainOptions) -> None:
        shared: dict[str, Any] = {"flip": setting.flip_latents, "copies": setting.copies}
        if method == "binary":
            config = dict(setting.transformer)
            train_denoiser(first, config, data, run, second, captions=captions, label_dropout=DROPPED, **shared)
        else:
            train_opponent(CLASSES[method], autoencoder, setting, data, captions, run, second)

    autoencoder = stage(first, AUTOENCODERS[method], options(setting, 0, setting.minutes[0], steps), compress)
    return stage(second, CLASSES[method], options(setting, 1, setting.minutes[1], steps), diffuse)


def train_opponents_autoencoder(model: nn.Module, data: ImageData, run: TrainOptions, out: Path, augmented: bool) -> None:
    """The objective of `train_autoencoder`, L1 + MSE on mirrored (and moved and scaled) images, with the terms of the model."""
    accel = accelerator()
    images = data.images.to(accel.device)

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        x = to_float(images[rows])
        x = augment(x) if augmented else x
        x = torch.cat([x[: len(x) // 2], x[len(x) // 2 :].flip(-1)])
        decoded, terms = trained(x.to(next(trained.parameters()).dtype))
        l1, mse = F.l1_loss(decoded.float(), x), F.mse_loss(decoded.float(), x)
        loss = l1 + mse + torch.stack(list(terms.values())).sum()
        return {"loss": loss, "l1": l1.detach(), **{name: term.detach() for name, term in terms.items()}}

    averaged: Any = train(model, objective, len(data), run, out, accel, {})
    averaged.save_pretrained(out)


def train_opponent(
    kind: type[Any],
    autoencoder: Any,
    setting: Setting,
    data: ImageData,
    captions: CaptionFeatures | None,
    run: TrainOptions,
    out: Path,
) -> None:
    """What `train_denoiser` does, with the method's own loss."""
    accel = accelerator()
    latents = encode_images(autoencoder, data.images, setting.flip_latents, setting.copies, run.seed)
    condition: Labels | Captions
    if captions is not None:
        known: dict[str, Any] = {"text_width": captions.width}
        condition = Captions(captions, DROPPED, accel.device)
    else:
        assert data.labels is not None
        known = {"num_classes": int(data.labels.max()) + 1}
        condition = Labels(data.labels.to(accel.device), known["num_classes"], DROPPED)
    torch.manual_seed(run.seed)
    model = kind(dict(autoencoder._hub_mixin_config), {**setting.transformer, **known}).to(accel.device)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if isinstance(model, GaussianDiffusion):
        model.standardise(latents)

    def objective(trained: nn.Module, rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": model.loss(trained, latents[rows], condition(rows % len(data)))}

    model.denoiser = train(model.denoiser, objective, len(latents), run, out, accel, {})
    model.save_pretrained(out)
