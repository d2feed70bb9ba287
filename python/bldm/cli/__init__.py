"""The command line: `bldm sample`, `bldm train` and so on. One file a command."""

import typer

from . import bench, convert, doctor, encode, nearest, profile, reconstruct, sample, train

app = typer.Typer(
    name="bldm", help="Binary latent diffusion: sample, train, inspect.", no_args_is_help=True, add_completion=False
)
app.command("sample")(sample.sample)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("encode")(encode.encode)
app.command("nearest")(nearest.nearest)
app.command("train-autoencoder")(train.train_autoencoder)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("bench")(bench.bench)
app.command("profile")(profile.profile)
app.command("doctor")(doctor.doctor)
