"""`bldm train-autoencoder` and `bldm train`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import bldm_kernels as bk

from ..data import ImageData, load_images
from ..generate import Share
from ..store import LatentStore
from ..training.options import TrainOptions
from .common import console, load_captions, one_line_errors

Data = Annotated[Path, typer.Argument(help="IDX folder, NPZ file or folder of images")]
Out = Annotated[Path, typer.Option(help="Folder to write the model, checkpoints and train.json to")]
Steps = Annotated[int, typer.Option(help="Optimiser steps")]
BatchSize = Annotated[int, typer.Option(help="Images a step and process")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate")]
Decay = Annotated[float, typer.Option("--ema-decay", help="Of the averaged weights, which are what is saved")]
Precision = Annotated[str | None, typer.Option(help="no or bf16 [default: bf16 on a GPU, else no]")]
Compile = Annotated[bool, typer.Option("--compile", help="Train under torch.compile")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so many minutes, with a checkpoint to --resume from")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many images")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels; needed for folders of images")]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror images too")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out")]
LogDir = Annotated[str | None, typer.Option(help="Write TensorBoard scalars and sample grids there")]
ImageEvery = Annotated[int, typer.Option(help="Steps between sample grids in TensorBoard")]
Warmup = Annotated[int, typer.Option(help="Steps of the learning rate's rise, at most a tenth of all")]
RateSchedule = Annotated[str, typer.Option("--lr-schedule", help="cosine or constant")]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Several processes: shard weights and optimiser (FSDP2), not a copy on each")]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]


def _load(data: Path, image_size: int | None, limit: int | None) -> ImageData:
    loaded = load_images(data, "train", image_size)
    if limit is not None:
        loaded = loaded.first(bk.checks.integer("max_train_samples", limit, 1, 2**62))
    return loaded


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected integers separated by commas, got {text!r}") from None


def _precision(name: str | None) -> str:
    """The one named, else what suits the device that training is on, which may be the CPU of a machine with a GPU."""
    from ..training.loop import accelerator

    return name or ("bf16" if accelerator().device.type == "cuda" else "no")


@one_line_errors
def train_autoencoder(
    data: Data,
    out: Out = Path("runs/autoencoder"),
    bits: Annotated[int, typer.Option(help="Bits at each position")] = 32,
    base_channels: Annotated[int, typer.Option(help="Width of the first level")] = 64,
    multipliers: Annotated[str, typer.Option(help="Width of each level; every level after the first halves the grid")] = "1,2,2",
    res_blocks: Annotated[int, typer.Option(help="Residual blocks a level")] = 1,
    attention: Annotated[bool, typer.Option("--attention", help="Attention at the lowest resolution")] = False,
    mode: Annotated[str, typer.Option(help="Bits in training: bernoulli or threshold")] = "bernoulli",
    mse_weight: Annotated[float, typer.Option(help="Loss: L1 + this times MSE")] = 1.0,
    entropy_weight: Annotated[float, typer.Option(help="Reward for using every bit")] = 0.0,
    lpips_weight: Annotated[float, typer.Option(help="Of the perceptual distance LPIPS (extra lpips); 0: none")] = 0.0,
    gan_weight: Annotated[float, typer.Option(help="Of the patch discriminator, before its adaptive weight; 0: none")] = 0.0,
    gan_start: Annotated[int, typer.Option(help="Step from which on the discriminator takes part")] = 0,
    steps: Steps = 10_000,
    batch_size: BatchSize = 256,
    lr: Rate = 1e-3,
    warmup: Warmup = 200,
    lr_schedule: RateSchedule = "cosine",
    ema_decay: Decay = 0.999,
    mixed_precision: Precision = None,
    compile: Compile = False,
    fsdp: Fsdp = False,
    max_minutes: Minutes = None,
    max_train_samples: Limit = None,
    image_size: ImageSize = None,
    flip: Flip = False,
    augment: Annotated[bool, typer.Option("--augment", help="Move and scale images a little at random")] = False,
    save_every: SaveEvery = 2000,
    resume: Resume = False,
    log_dir: LogDir = None,
    image_every: ImageEvery = 2000,
    seed: Seed = 0,
) -> None:
    """Train a binary autoencoder on images."""
    from ..training.autoencoder import lpips
    from ..training.autoencoder import train_autoencoder as run

    levels = _integers("multipliers", multipliers)
    loaded = _load(data, image_size, max_train_samples)
    if loaded.images.shape[2] != loaded.images.shape[3]:
        raise ValueError(f"data: expected square images, got {tuple(loaded.images.shape[2:])}")
    config = {
        "image_size": loaded.images.shape[2],
        "in_channels": loaded.images.shape[1],
        "num_bits": bits,
        "base_channels": base_channels,
        "channel_multipliers": levels,
        "num_res_blocks": res_blocks,
        "attention": attention,
        "mode": mode,
    }
    options = TrainOptions(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        lr_schedule=lr_schedule,
        ema_decay=ema_decay,
        seed=seed,
        mixed_precision=_precision(mixed_precision),
        compile=compile,
        fsdp=fsdp,
        save_every=save_every,
        max_minutes=max_minutes,
        resume=resume,
        log_dir=log_dir,
        image_every=image_every,
    )
    model = run(
        config,
        loaded,
        options,
        out,
        mse_weight=mse_weight,
        entropy_weight=entropy_weight,
        perceptual=lpips() if lpips_weight else None,
        perceptual_weight=lpips_weight,
        gan_weight=gan_weight,
        gan_start=gan_start,
        flip=flip,
        augmented=augment,
        details={"data": str(data)},
    )
    _report(f"{out}: autoencoder with {_millions(model)} parameters, latents of {model.latent_shape} bits")


@one_line_errors
def train(
    autoencoder: Annotated[Path, typer.Option(help="Folder of a trained autoencoder")],
    data: Annotated[Path | None, typer.Argument(help="IDX folder, NPZ file or folder of images; or --store")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder that `bldm encode` wrote with this autoencoder")] = None,
    out: Out = Path("runs/diffusion"),
    width: Annotated[int, typer.Option(help="Width of the transformer")] = 256,
    depth: Annotated[int, typer.Option(help="Blocks")] = 6,
    heads: Annotated[int, typer.Option(help="Attention heads")] = 4,
    dropout: Annotated[float, typer.Option(help="Dropout in the blocks")] = 0.0,
    schedule: Annotated[str, typer.Option(help="linear, cosine or sigmoid")] = "linear",
    num_steps: Annotated[int, typer.Option(help="T, steps of the diffusion")] = 256,
    prediction: Annotated[str, typer.Option(help="flip or x_0")] = "flip",
    form: Annotated[str, typer.Option(help="Loss: plain, balanced or focal")] = "plain",
    focal_gamma: Annotated[float, typer.Option(help="Exponent of the focal form")] = 1.0,
    weighting: Annotated[str, typer.Option(help="mean, or weighted by 1 - (t - 1) / T")] = "mean",
    posterior_kl: Annotated[float, typer.Option(help="Factor of the posterior's KL term")] = 0.0,
    label_dropout: Annotated[float, typer.Option(help="Share of labels or captions left out, for guidance")] = 0.1,
    steps: Steps = 20_000,
    batch_size: BatchSize = 256,
    lr: Rate = 5e-4,
    warmup: Warmup = 200,
    lr_schedule: RateSchedule = "cosine",
    ema_decay: Decay = 0.9995,
    mixed_precision: Precision = None,
    compile: Compile = False,
    fsdp: Fsdp = False,
    max_minutes: Minutes = None,
    max_train_samples: Limit = None,
    flip: Flip = False,
    augment: Annotated[int, typer.Option(min=0, help="Copies of each image, moved and scaled a little, to train on too")] = 0,
    text: Annotated[str | None, typer.Option(help="Captions as one vector or as tokens for cross attention [vector]")] = None,
    save_every: SaveEvery = 2000,
    resume: Resume = False,
    log_dir: LogDir = None,
    image_every: ImageEvery = 2000,
    seed: Seed = 0,
) -> None:
    """Train a denoiser on the bits of a trained autoencoder; conditional when the data has labels or captions."""
    from ..autoencoder import BinaryAutoencoder
    from ..training.denoiser import train_denoiser

    loaded: ImageData | LatentStore
    captions = None
    if data is not None and store is None:
        loaded = _load(data, BinaryAutoencoder.from_pretrained(autoencoder).image_size, max_train_samples)
        if text is not None or loaded.captions is not None:
            captions = load_captions(data, "train", loaded.captions, text or "vector")
    elif store is not None and data is None:
        for name, given in {"max_train_samples": max_train_samples, "text": text}.items():
            if given is not None:
                raise ValueError(f"{name}: a store is used whole and with its own texts, expected None")
        loaded = LatentStore(store)
    else:
        raise ValueError("data, store: expected one of them, got " + ("none" if data is None else "both"))
    options = TrainOptions(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        lr_schedule=lr_schedule,
        ema_decay=ema_decay,
        seed=seed,
        mixed_precision=_precision(mixed_precision),
        compile=compile,
        fsdp=fsdp,
        save_every=save_every,
        max_minutes=max_minutes,
        resume=resume,
        log_dir=log_dir,
        image_every=image_every,
    )
    model = train_denoiser(
        autoencoder,
        {"width": width, "depth": depth, "num_heads": heads, "dropout": dropout},
        loaded,
        options,
        out,
        schedule=schedule,
        num_steps=num_steps,
        prediction=prediction,
        label_dropout=label_dropout,
        flip=flip,
        copies=augment,
        captions=captions,
        loss={"form": form, "focal_gamma": focal_gamma, "weighting": weighting, "posterior_kl": posterior_kl},
        details={"data": str(data or store)},
    )
    _report(f"{out}: denoiser with {_millions(model.denoiser)} parameters; try: bldm sample --model {out}")


def _report(text: str) -> None:
    """One of the processes says it."""
    if Share.of_launcher().rank == 0:
        console.print(text, soft_wrap=True)


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
