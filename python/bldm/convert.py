"""Checkpoints of the paper's own code (ZeWang95/BinaryLatentDiffusion) as models of this library.

Those files are bare state dicts: `binaryae_ema_*.th` and `binaryae_*.th` hold the autoencoder with its training companions,
`bld_ema_*.th` and `bld_*.th` the denoiser with its schedule. They are pickles, so only tensors are ever read from them. What
shapes tell is inferred; every tensor is then accounted for: missing, unexpected and misshapen ones are all named in one error.
"""

import math
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk
from bldm_kernels.schedule import KINDS

from .autoencoder import BinaryAutoencoder
from .convnets import ResidualBlock
from .denoiser import BinaryDenoiser
from .diffusion import BinaryLatentDiffusion

TABLES = ("k_final", "b_final", "beta", "cumbeta")
TABLE_TOLERANCE = 1e-5  # float32 tables, one of them a cumulative product
# Companions of the autoencoder's training; logsigma is a variance head that nothing reads.
TRAINING_ONLY = re.compile(r"(disc|perceptual|ae\.generator\.logsigma)\.")
VOTERS = ("norm2.weight", "norm2.bias", "conv1.bias", "conv2.bias")  # tensors of a residual block that are as long as it is wide
# Modules of our convolutional blocks whose tensors go by other names; queries, keys and values are stored apart.
BLOCK_NAMES = {"skip": ("conv_out",), "qkv": ("q", "k", "v"), "out": ("proj_out",)}
DENOISER_NAMES = (
    (r"^token_weight$", "tok_emb.weight"),
    (r"^positions$", "pos_emb"),
    (r"^time\.0\.", "time_step_embedding.l0."),
    (r"^time\.2\.", "time_step_embedding.linear."),
    (r"^(classes|text)\.", "cls_embedding."),
    (r"^norm\.", "ln_f."),
    (r"\.norm(\d)\.", r".ln\1."),
    (r"\.norm_cross\.", ".ln1_5."),
    (r"\.gamma(\d)$", r".gamma_\1"),
    (r"\.gamma_cross$", ".gamma_1_5"),
    (r"^(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.cross\.null$", ".cross.null_emb"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one file, without the `module.` of a distributed model."""

    path: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> "Checkpoint":
        """Raises ValueError for anything but a pickled dict of tensors, in particular for a pickle that carries code."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: no file {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            why = str(error).split("\n")[0]
            raise ValueError(f"checkpoint: {path} is refused: it holds more than tensors, or is no pickle ({why})") from None
        except Exception as error:  # damaged bytes make the unpickler raise anything at all
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"checkpoint: {path} is truncated or not a PyTorch checkpoint ({why})") from error
        if not isinstance(state, dict) or not state:
            what = "an empty one" if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"checkpoint: {path}: expected a state dict, got {what}")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                what = f"{'sparse ' if isinstance(value, Tensor) and value.is_sparse else ''}{type(value).__name__}"
                raise ValueError(f"checkpoint: {path}: expected named tensors, got a {what} called {name!r}")
        prefix = "module." if all(name.startswith("module.") for name in state) else ""
        return cls(path, {name.removeprefix(prefix): value.detach() for name, value in state.items()})

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Shape of a tensor that the configuration is read from."""
        if name not in self.tensors:
            raise ValueError(f"checkpoint: {self.path} has no {name}, without which nothing is known of the model")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != num_dims or 0 in shape:
            raise ValueError(f"checkpoint: {self.path}: {name}: expected {num_dims} dimensions, got shape {shape}")
        return shape

    def below(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]

    def verify(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError naming every tensor that is missing, unexpected, misshapen or not made of finite numbers."""
        found = {name for name in self.tensors if not TRAINING_ONLY.match(name)}
        shapes = {name: tuple(self.tensors[name].shape) for name in expected.keys() & found}
        wrong = [f"{n}: expected {expected[n]}, got {shapes[n]}" for n in sorted(shapes) if expected[n] != shapes[n]]
        broken = [n for n in sorted(shapes) if not (self.tensors[n].is_floating_point() and self.tensors[n].isfinite().all())]
        complaints = {
            "missing": sorted(expected.keys() - found),
            "unexpected": sorted(found - expected.keys()),
            "wrong shape": wrong,
            "not finite floating numbers": broken,
        }
        if any(complaints.values()):
            told = "; ".join(f"{what} {names}" for what, names in complaints.items() if names)
            raise ValueError(f"checkpoint: {self.path} is not a whole model: {told}")


def convert_autoencoder(
    checkpoint: Checkpoint, *, image_size: int, tanh: bool = False, divide_code: bool | None = None
) -> BinaryAutoencoder:
    """The `BinaryAutoencoder` of a `binaryae_*.th`.

    Args:
        image_size: pixels, which a convolutional network does not tell.
        tanh: trained with --use_tanh: bits are -1 and 1, and P(1) = (1 + tanh(l)) / 2 = sigmoid(2 l).
        divide_code: divide the bits by C in front of the decoder, as the reference does when it decodes samples of a model
            without --norm_first (its autoencoder alone never does); default: exactly for those.
    """
    config = _autoencoder_config(checkpoint)
    model = BinaryAutoencoder(image_size=image_size, signed=tanh, **config)
    sources = {"embedding": ["ae.quantize.embed.weight"]}
    unused: dict[str, tuple[int, ...]] = {}
    *encoder, projection = model.encoder
    for ours, theirs, blocks in (("encoder", "ae.encoder.blocks", encoder), ("decoder", "ae.generator.blocks", model.decoder)):
        for i, block in enumerate(blocks):
            for name, _ in block.named_parameters():
                head, _, tail = name.rpartition(".")
                names = [f"{n}.{tail}" if n else tail for n in BLOCK_NAMES.get(head, (head,))]
                sources[f"{ours}.{i}.{name}"] = [f"{theirs}.{i}.{n}" for n in names]
            if isinstance(block, ResidualBlock) and isinstance(block.skip, nn.Identity):
                width = block.conv1.in_channels  # stored, but used only where the width changes
                unused |= {f"{theirs}.{i}.conv_out.weight": (width, width, 1, 1), f"{theirs}.{i}.conv_out.bias": (width,)}
    for name, _ in projection.named_parameters():
        sources[f"encoder.{len(encoder)}.{name}"] = [f"ae.quantize.proj.0.{name}"]
    _fill(model, checkpoint, sources, unused)
    with torch.no_grad():
        if tanh:
            for parameter in projection.parameters():
                parameter.mul_(2)
        if not config["norm_first"] if divide_code is None else divide_code:
            model.embedding.div_(config["num_bits"])
    return model


def _autoencoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    num_bits, embedding_width = checkpoint.shape("ae.quantize.embed.weight", 2)
    base_channels, in_channels, _, _ = checkpoint.shape("ae.encoder.blocks.0.weight", 4)
    encoder, decoder = _block_kinds(checkpoint, "ae.encoder.blocks"), _block_kinds(checkpoint, "ae.generator.blocks")
    down = re.fullmatch(r"C((?:(?:RA?)+S)*(?:RA?)+)RARNC", encoder)
    up = re.fullmatch(r"(N?)CRAR((?:(?:RA?)+S)*(?:RA?)+)NC", decoder)
    for name, match, kinds in (("encoder", down, encoder), ("generator", up, decoder)):
        if match is None:
            raise ValueError(
                f"checkpoint: {checkpoint.path}: ae.{name}.blocks are not those of the reference: got {kinds} "
                "(C convolution, N norm, R residual block, A attention, S resampling, ? incomplete)"
            )
    assert down is not None and up is not None
    levels = down[1].split("S")
    widths, first = [], 1
    for level in levels:
        # Taken by vote, so that one damaged tensor is reported as such instead of passing for another architecture.
        tensors = [checkpoint.tensors.get(f"ae.encoder.blocks.{first + i}.{n}") for i in range(len(level)) for n in VOTERS]
        votes = Counter(len(tensor) for tensor in tensors if tensor is not None and tensor.dim() == 1)
        widths.append(votes.most_common(1)[0][0] if votes else 0)
        first += len(level) + 1
    return {
        "architecture": "taming",
        "in_channels": in_channels,
        "num_bits": num_bits,
        "base_channels": base_channels,
        "channel_multipliers": [width // base_channels for width in widths],
        "num_res_blocks": levels[0].count("R"),
        "decoder_res_blocks": up[2].split("S")[0].count("R"),
        "attention_levels": [i for i, level in enumerate(levels) if "A" in level],
        "embedding_width": embedding_width,
        "norm_first": bool(up[1]),
    }


def _block_kinds(checkpoint: Checkpoint, prefix: str) -> str:
    """One letter a block, from the names of its tensors."""
    inside: dict[int, set[str]] = {}
    for name in checkpoint.below(f"{prefix}."):
        index, _, rest = name.partition(".")
        if index.isdecimal():
            inside.setdefault(int(index), set()).add(rest)
    kinds = ""
    for i in range(min(max(inside, default=-1) + 1, 1000)):
        heads = {name.split(".")[0] for name in inside.get(i, ())}
        if heads & {"norm1", "conv1", "norm2", "conv2"}:
            kinds += "R"
        elif heads & {"q", "k", "v", "proj_out"}:
            kinds += "A"
        elif heads & {"conv"}:
            kinds += "S"
        elif "weight" in heads:
            kinds += "C" if checkpoint.tensors[f"{prefix}.{i}.weight"].dim() == 4 else "N"
        else:
            kinds += "?"
    return kinds


def convert_denoiser(checkpoint: Checkpoint, *, num_steps: int, num_heads: int) -> BinaryDenoiser:
    """The `BinaryDenoiser` of a `bld_*.th`.

    Args:
        num_steps: --sample_steps of the training command. It scales the time embedding and belongs to the model from here on:
            sampling with fewer steps never changes it.
        num_heads: --bert_n_head.
    """
    model = BinaryDenoiser(**_denoiser_config(checkpoint), num_steps=num_steps, num_heads=num_heads)
    sources = {}
    for ours, _ in model.named_parameters():
        name = ours
        for pattern, replacement in DENOISER_NAMES:
            name = re.sub(pattern, replacement, name)
        sources[ours] = [f"_denoise_fn.{name}"]
    del sources["token_bias"]  # the reference has none
    length = checkpoint.shape("scheduler.k_final", 1)
    unused = {f"scheduler.{name}": length for name in TABLES}
    if "embedding_weight" in checkpoint.tensors:  # the autoencoder's, kept for decoding
        unused["embedding_weight"] = (model.num_bits, *checkpoint.shape("embedding_weight", 2)[1:])
    _fill(model, checkpoint, sources, unused)
    convert_schedule(checkpoint)
    nn.init.zeros_(model.token_bias)
    return model


def _denoiser_config(checkpoint: Checkpoint) -> dict[str, Any]:
    num_bits, width = checkpoint.shape("_denoise_fn.tok_emb.weight", 2)
    indices = [int(name.split(".")[0]) for name in checkpoint.below("_denoise_fn.blocks.") if name.split(".")[0].isdecimal()]
    config: dict[str, Any] = {
        "num_positions": checkpoint.shape("_denoise_fn.pos_emb", 3)[1],
        "num_bits": num_bits,
        "width": width,
        "depth": len(set(indices)),
        "time_embedding": "reference",
        "null_class": False,
    }
    condition, cross = "_denoise_fn.cls_embedding.weight", "_denoise_fn.blocks.0.cross.kv.weight"
    if cross in checkpoint.tensors:
        config |= {"text_width": checkpoint.shape(cross, 2)[1], "cross_attention": True}
    elif condition in checkpoint.tensors:
        rows, columns = checkpoint.shape(condition, 2)
        # A linear layer has a bias; without it, a square matrix could pass for as many classes as channels.
        is_text = "_denoise_fn.cls_embedding.bias" in checkpoint.tensors or columns != width or rows == width
        config |= {"text_width": columns} if is_text else {"num_classes": rows}
    return config


def _fill(model: nn.Module, checkpoint: Checkpoint, sources: dict[str, list[str]], unused: dict[str, tuple[int, ...]]) -> None:
    """Load every parameter from the tensors named in `sources` (several: one after the other), once all are verified."""
    parameters = dict(model.named_parameters())
    expected = dict(unused)
    for ours, names in sources.items():
        shape = tuple(parameters[ours].shape)
        shape = (shape[0] // len(names), *shape[1:])
        for name in names:
            leading = {"_denoise_fn.pos_emb": 1}.get(name, 2 if name.endswith(".null_emb") else 0)
            expected[name] = (*[1] * leading, *shape)
    checkpoint.verify(expected)
    with torch.no_grad():
        for ours, names in sources.items():
            parameters[ours].copy_(torch.cat([checkpoint.tensors[name] for name in names]).view_as(parameters[ours]))
    model.eval()


def convert_schedule(checkpoint: Checkpoint) -> bk.BernoulliSchedule:
    """The schedule whose tables are in a `bld_*.th`; raises ValueError saying by how much when none of the known ones fits."""
    lengths = {name: checkpoint.shape(f"scheduler.{name}", 1)[0] for name in TABLES}
    if len(set(lengths.values())) > 1 or lengths["k_final"] < 2:
        raise ValueError(f"checkpoint: {checkpoint.path}: scheduler: expected tables of T + 1 values, got {lengths}")
    num_steps, told = lengths["k_final"] - 1, []
    for kind in KINDS:
        schedule = bk.BernoulliSchedule(kind, num_steps)
        beta = torch.cat([schedule.keep[:1], schedule.keep[1:] / schedule.keep[:-1]])
        ours = {"k_final": schedule.keep, "b_final": schedule.flip, "beta": beta, "cumbeta": schedule.keep}
        differences = {name: float((checkpoint.tensors[f"scheduler.{name}"] - table).abs().max()) for name, table in ours.items()}
        if all(difference <= TABLE_TOLERANCE for difference in differences.values()):
            return schedule
        told.append(f"{kind}: " + ", ".join(f"{name} by {difference:.2g}" for name, difference in differences.items()))
    raise ValueError(f"checkpoint: {checkpoint.path}: scheduler is no known schedule of {num_steps} steps: {'; '.join(told)}")


def convert_diffusion(
    autoencoder: Checkpoint,
    denoiser: Checkpoint,
    *,
    num_steps: int,
    num_heads: int,
    prediction: str,
    image_size: int | None = None,
    tanh: bool = False,
    divide_code: bool | None = None,
) -> BinaryLatentDiffusion:
    """Both in one `BinaryLatentDiffusion`; arguments as in `convert_autoencoder` and `convert_denoiser`.

    Args:
        prediction: "flip" if trained with --p_flip, else "x_0".
        image_size: default: from the denoiser's grid.
    """
    converted = convert_denoiser(denoiser, num_steps=num_steps, num_heads=num_heads)
    schedule = convert_schedule(denoiser)
    scale = 2 ** (len(_autoencoder_config(autoencoder)["channel_multipliers"]) - 1)
    fitting = math.isqrt(converted.num_positions) * scale
    image_size = fitting if image_size is None else image_size
    encoder = convert_autoencoder(autoencoder, image_size=image_size, tanh=tanh, divide_code=divide_code)
    height, width, num_bits = encoder.latent_shape
    if (height * width, num_bits) != (converted.num_positions, converted.num_bits):
        raise ValueError(
            f"autoencoder, denoiser: expected the same latents, got {height} x {width} x {num_bits} at {image_size} pixels "
            f"and {converted.num_positions} x {converted.num_bits}"
        )
    _check_embedding(autoencoder, denoiser)
    configs: list[Any] = [encoder._hub_mixin_config, converted._hub_mixin_config]
    model = BinaryLatentDiffusion(
        autoencoder=dict(configs[0]),
        denoiser=dict(configs[1]),
        schedule=schedule.kind,
        num_steps=schedule.num_steps,
        prediction=prediction,
    )
    model.autoencoder, model.denoiser = encoder, converted
    return model.eval()


def _check_embedding(autoencoder: Checkpoint, denoiser: Checkpoint) -> None:
    """A denoiser knows the embedding of the bits it was trained on: another autoencoder's bits mean something else."""
    if "embedding_weight" not in denoiser.tensors:
        return
    theirs, ours = denoiser.tensors["embedding_weight"].double(), autoencoder.tensors["ae.quantize.embed.weight"].double()
    difference = float((theirs - ours).abs().max() / ours.abs().max()) if theirs.shape == ours.shape else math.inf
    if not difference <= 1e-3:  # it may have been stored in half precision
        raise ValueError(
            f"autoencoder, denoiser: {denoiser.path} was trained on the bits of another autoencoder than {autoencoder.path}: "
            f"embedding_weight differs by {difference:.2g} of the largest value"
        )
