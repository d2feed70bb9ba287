"""`bldm convert`: checkpoints of the paper's own code to a folder of this library."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..convert import Checkpoint, convert_autoencoder, convert_denoiser, convert_diffusion, convert_schedule
from .common import console, one_line_errors


def _required(given: dict[str, Any]) -> None:
    """One error for everything that the files do not hold and nobody has said."""
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: the checkpoint does not hold this; look at the command it was trained with")


@one_line_errors
def convert(
    autoencoder: Annotated[Path | None, typer.Option(help="binaryae_ema_*.th or binaryae_*.th")] = None,
    denoiser: Annotated[Path | None, typer.Option(help="bld_ema_*.th or bld_*.th")] = None,
    training_steps: Annotated[int | None, typer.Option(help="--sample_steps of the denoiser's training command")] = None,
    prediction: Annotated[str | None, typer.Option(help="flip if it was trained with --p_flip, else x_0")] = None,
    heads: Annotated[int | None, typer.Option(help="--bert_n_head of the training command (default there: 12)")] = None,
    image_size: Annotated[int | None, typer.Option(help="--img_size [default: from the denoiser's grid]")] = None,
    tanh: Annotated[bool, typer.Option("--tanh", help="The autoencoder was trained with --use_tanh")] = False,
    divide_code: Annotated[
        bool | None,
        typer.Option("--divide-code/--no-divide-code", help="Bits / C in front of the decoder [default: without --norm_first]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write")] = Path("converted"),
) -> None:
    """Convert checkpoints of ZeWang95/BinaryLatentDiffusion: an autoencoder, a denoiser, or both into one model.

    Only tensors are read: a file that carries code is refused. Every tensor is accounted for.
    """
    if autoencoder is None and denoiser is None:
        raise ValueError("autoencoder, denoiser: expected one of them at least, got none")
    files = [None if path is None else Checkpoint.read(path) for path in (autoencoder, denoiser)]
    model: Any
    notes = []
    if files[1] is not None:
        _required({"training-steps": training_steps, "heads": heads})
        assert training_steps is not None and heads is not None
        if files[0] is not None:
            _required({"prediction": prediction})
            assert prediction is not None
            model = convert_diffusion(
                files[0],
                files[1],
                num_steps=training_steps,
                num_heads=heads,
                prediction=prediction,
                image_size=image_size,
                tanh=tanh,
                divide_code=divide_code,
            )
        else:
            model = convert_denoiser(files[1], num_steps=training_steps, num_heads=heads)
        schedule = convert_schedule(files[1])
        notes.append(f"{schedule.kind} schedule of {schedule.num_steps} steps")
        if schedule.num_steps != training_steps:
            notes.append(f"time told as a share of {training_steps}")
    elif files[0] is not None:
        _required({"image-size": image_size})
        assert image_size is not None
        model = convert_autoencoder(files[0], image_size=image_size, tanh=tanh, divide_code=divide_code)
    model.save_pretrained(out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    shape = model.latent_shape if autoencoder is not None else (model.num_positions, model.num_bits)
    told = ", ".join([f"{millions:.2f} M parameters", f"latents of {shape} bits", *notes])
    console.print(f"{out}: {type(model).__name__}, {told}", soft_wrap=True, highlight=False, markup=False)
