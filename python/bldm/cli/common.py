"""What several commands share: errors as one line, the device, the model."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from bldm_kernels import checks

from ..autoencoder import BinaryAutoencoder
from ..bundled import bundled_model
from ..checkpoint import CONFIG, find_folder
from ..data import split_folder
from ..diffusion import BinaryLatentDiffusion
from ..training.conditions import CaptionFeatures, caption_features, features_file

console = Console()
ERRORS = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A wrong argument ends the command with one line and exit code 1, not with a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ERRORS as error:
            text = escape(" ".join(str(error).split()))
            Console(stderr=True).print(f"[red]error:[/red] {text}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from None

    return run


def choose_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device named, else a GPU if there is one: of several processes on a machine, each its own."""
    gpu = "cuda" if local_rank is None else f"cuda:{local_rank}"
    device = torch.device(name or (gpu if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} asked for, but no GPU is visible")
    return device


def load_model(path: Path | None, device: torch.device, bundled: str = "fashion-mnist") -> BinaryLatentDiffusion:
    """The model of a folder or hub repository, else the bundled one of this name."""
    return BinaryLatentDiffusion.from_pretrained(path or bundled_model(bundled), map_location=device)


def load_autoencoder(path: Path | None, device: torch.device) -> BinaryAutoencoder:
    """The autoencoder of a folder (or hub repository) that holds one, or a whole model."""
    folder = find_folder(str(path or bundled_model()))
    try:
        whole = "autoencoder" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        whole = False  # the loader says what is wrong
    return load_model(folder, device).autoencoder if whole else BinaryAutoencoder.from_pretrained(folder, map_location=device)


def load_captions(data: Path, split: str, captions: list[list[str]] | None, text: str) -> CaptionFeatures:
    """Features of the captions of a split, as one "vector" or as "tokens", kept beside them."""
    tokens = checks.option("text", text, ("vector", "tokens")) == "tokens"
    if captions is None:
        raise ValueError(f"text: {text!r} asked for, but {data} has no captions")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return caption_features(captions, features_file(split_folder(data, split), tokens), tokens=tokens, device=device)
