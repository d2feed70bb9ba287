"""`bldm profile`: where the time of sampling and decoding goes, on this machine."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..diffusion import BinaryLatentDiffusion
from ..families import Accelerated, accelerate
from ..painter import Painter
from ..profiling import profile as take_profile
from ..sampling import FastSampler
from .common import choose_device, console, load_model, one_line_errors

# How a model runs: as it is, under autocast to bfloat16, or as an engine of that precision.
PRECISIONS = ("float32", "autocast", "bf16", "fp8")


def _factory(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules of the working directory count."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"import: expected module:function, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"import: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ValueError(f"import: {module} has no function {attribute}")
    return found


def _made(name: str, batch: int, steps: int, device: torch.device) -> tuple[Any, Any]:
    """What the factory makes, and how to call it (None: as this library's own)."""
    made = _factory(name)(batch, steps, device)
    return made if isinstance(made, tuple) else (made, None)


@one_line_errors
def profile(
    model: Annotated[Path | None, typer.Option(help="Model folder, or user/name on the hub [default: bundled]")] = None,
    imported: Annotated[
        str | None,
        typer.Option("--import", help="module:function that makes the model instead: see docs/profiling.md"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once")] = 1,
    steps: Annotated[int, typer.Option(help="Sampling steps")] = 16,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none")] = 1.0,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls, and recorded calls; the median counts")] = 3,
    depth: Annotated[int, typer.Option(min=1, help="Levels of modules, for models that mark no parts")] = 4,
    each: Annotated[bool, typer.Option("--each", help="A line for each block instead of one for all of them")] = False,
    png: Annotated[Path | None, typer.Option(help="Also draw it")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also write a trace for ui.perfetto.dev (JSON)")] = None,
) -> None:
    """Show where the time of sampling and decoding goes: part by part, and what is idle in between.

    Parts are timed by torch's profiler; the latencies that they add up to without it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start and stop on stderr
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if imported is not None and model is not None:
        raise ValueError("model, import: expected one of them at most, got both")
    where = choose_device(device)
    options: dict[str, Any] = {"autocast": torch.bfloat16} if precision == "autocast" else {}
    target, call = (load_model(model, where), None) if imported is None else _made(imported, batch, steps, where)
    if precision in ("bf16", "fp8"):
        if not isinstance(target, BinaryLatentDiffusion):
            raise ValueError(f"precision: only a BinaryLatentDiffusion has an engine of {precision}, not {type(target).__name__}")
        target = target.optimize(precision)
    if not isinstance(target, (Painter, FastSampler, Accelerated)):
        target, options = accelerate(target, **options), {}
    size: dict[str, Any] = {"num_samples": batch, "steps": steps, "guidance_scale": guidance}
    found = take_profile(target, **size, call=call, repeats=repeats, depth=depth, **options)
    console.print(found.table(each))
    for path, write in ((png, found.plot), (trace, found.trace)):
        if path is not None:
            write(path)
            console.print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)
