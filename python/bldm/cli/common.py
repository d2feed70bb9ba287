"""What several commands share: errors as one line, the device, the model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ..bundled import bundled_model
from ..diffusion import BinaryLatentDiffusion

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


def choose_device(name: str | None) -> torch.device:
    """The device named, else a GPU if there is one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} asked for, but no GPU is visible")
    return device


def load_model(path: Path | None, device: torch.device) -> BinaryLatentDiffusion:
    return BinaryLatentDiffusion.from_pretrained(path or bundled_model(), map_location=device)
