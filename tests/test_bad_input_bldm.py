"""Wrong arguments of bldm's public functions: each error names the argument, what it was and what was expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm import FastSampler, PackedLatents
from bldm.grid import draw_grid
from tiny_models import tiny_model
from torch import Tensor

import bldm_kernels as bk

SHAPE = (4, 13)
SCHEDULE = bk.BernoulliSchedule("linear", 16)
IMAGES = torch.zeros(2, 1, 4, 4)


def denoiser(x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.zeros(len(x), *SHAPE)


def sampler(**options: Any) -> FastSampler:
    arguments: dict[str, Any] = {"denoiser": denoiser, "schedule": SCHEDULE, "latent_shape": SHAPE, **options}
    return FastSampler(arguments.pop("denoiser"), arguments.pop("schedule"), **arguments)


def sample(num_samples: Any = 2, steps: Any = 2, null_cond: Any = None, **options: Any) -> Tensor:
    return sampler(null_cond=null_cond).sample(num_samples, steps, **options)


def packed(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def latents(count: int = 3, shape: tuple[int, ...] = SHAPE) -> PackedLatents:
    return PackedLatents(bk.random_bits(count, shape, seed=0), shape)


Row = tuple[Callable[[], Any], type[Exception], str]

SAMPLER: list[Row] = [
    (lambda: sampler(denoiser=3), TypeError, "denoiser: expected a callable, got int"),
    (lambda: sampler(schedule="linear"), TypeError, "schedule: expected a BernoulliSchedule, got str"),
    (lambda: sampler(latent_shape=(13,)), ValueError, r"latent_shape: expected positions and channels, got \(13,\)"),
    (lambda: sampler(latent_shape=(4, 0)), ValueError, "latent_shape: expected 1 <= latent_shape .*, got 0"),
    (lambda: sampler(latent_shape=(4, -8)), ValueError, "latent_shape: expected 1 <= latent_shape .*, got -8"),
    (lambda: sampler(latent_shape=(4, 8.0)), TypeError, "latent_shape: expected an int, got float"),
    (lambda: sampler(prediction="noise"), ValueError, "prediction: expected one of 'flip', 'x_0', got 'noise'"),
    (lambda: sampler(rule="plug-in"), ValueError, "rule: expected one of 'plugin', 'marginal', .*, got 'plug-in'"),
    (lambda: sampler(final="argmax"), ValueError, "final: expected one of .*'threshold', got 'argmax'"),
    (lambda: sampler(time_label="t+1"), ValueError, r"time_label: expected one of 't', 't-1', got 't\+1'"),
    (lambda: sampler(state="unpacked"), ValueError, "state: expected one of 'packed', 'bits', 'signs', got 'unpacked'"),
    (lambda: sampler(autocast="bf16"), TypeError, "autocast: expected a floating dtype or None, got 'bf16'"),
    (lambda: sampler(autocast=torch.int8), TypeError, "autocast: expected a floating dtype or None, got torch.int8"),
    (lambda: sampler(device="abacus"), RuntimeError, "device.*abacus"),
]

SAMPLE: list[Row] = [
    (lambda: sample(-1), ValueError, "num_samples: expected 0 <= num_samples <= .*, got -1"),
    (lambda: sample(2.0), TypeError, "num_samples: expected an int, got float"),
    (lambda: sample(steps=0), ValueError, "steps: expected 1 <= steps <= 16, got 0"),
    (lambda: sample(steps=17), ValueError, "steps: expected 1 <= steps <= 16, got 17"),
    (lambda: sample(steps=2.5), TypeError, "steps: expected an int, got float"),
    (lambda: sample(timesteps=[]), ValueError, "timesteps: expected at least one, got none"),
    (lambda: sample(timesteps=[1, 16]), ValueError, r"timesteps: expected strictly descending, got \[1, 16\]"),
    (lambda: sample(timesteps=[9, 9, 1]), ValueError, r"timesteps: expected strictly descending, got \[9, 9, 1\]"),
    (lambda: sample(timesteps=[17, 1]), ValueError, "timesteps: expected 1 <= timesteps <= 16, got 17"),
    (lambda: sample(timesteps=[16, 0]), ValueError, "timesteps: expected 1 <= timesteps <= 16, got 0"),
    (lambda: sample(timesteps=[16, 2.5]), TypeError, "timesteps: expected an int, got float"),
    (lambda: sample(timesteps=torch.tensor([2.5])), TypeError, "timesteps: expected an int, got float"),
    (lambda: sample(temperature=0), ValueError, "temperature: expected > 0, got 0"),
    (lambda: sample(temperature=-1.0), ValueError, "temperature: expected > 0, got -1.0"),
    (lambda: sample(temperature=float("nan")), ValueError, "temperature: expected a finite number, got nan"),
    (lambda: sample(temperature="hot"), TypeError, "temperature: expected a number, got str"),
    (lambda: sample(seed=2**64), ValueError, "seed: expected .* got 18446744073709551616"),
    (lambda: sample(seed=None), TypeError, "seed: expected an int, got NoneType"),
    (lambda: sample(seed=1.0), TypeError, "seed: expected an int, got float"),
    (lambda: sample(sample_offset=-1), ValueError, "sample_offset: expected 0 <= sample_offset .*, got -1"),
    (lambda: sample(batch_size=0), ValueError, "batch_size: expected 1 <= batch_size .*, got 0"),
    (lambda: sample(batch_size=1.5), TypeError, "batch_size: expected an int, got float"),
    (lambda: sample(guidance_scale=float("inf"), cond=1), ValueError, "guidance_scale: expected a finite number, got inf"),
    (lambda: sample(guidance_scale=2.0), ValueError, "guidance_scale: 2.0 needs a condition, but cond is None"),
    (lambda: sample(guidance_scale=2.0, cond=1), ValueError, "guidance_scale: 2.0 needs a null condition, but null_cond is None"),
    (lambda: sample(cond=torch.zeros(3)), ValueError, r"cond: expected 2 conditions, one a sample, got shape \(3,\)"),
    (lambda: sample(cond="shirt"), TypeError, "cond: expected an int, got str"),
    (lambda: sample(cond=-1), ValueError, "cond: expected 0 <= cond <= .*, got -1"),
    (lambda: sample(keep_mask=packed(4, 2)), ValueError, "keep_mask, keep_bits: expected both or neither"),
    (lambda: sample(keep_bits=packed(4, 2)), ValueError, "keep_mask, keep_bits: expected both or neither"),
    (
        lambda: sample(keep_mask=packed(4, 2, dtype=torch.bool), keep_bits=packed(4, 2)),
        TypeError,
        "keep_mask: expected dtype uint8, got bool",
    ),
    (
        lambda: sample(keep_mask=packed(4, 2), keep_bits=packed(4, 13)),
        ValueError,
        r"keep_bits: expected packed bits of shape \(4, 2\) for all samples, or \(2, 4, 2\), got \(4, 13\)",
    ),
    (lambda: sample(keep_mask=packed(3, 4, 2), keep_bits=packed(4, 2)), ValueError, r"keep_mask: .*, got \(3, 4, 2\)"),
    (
        lambda: sample(keep_mask=packed(4, 2) + 255, keep_bits=packed(4, 2) + 255),
        ValueError,
        "keep_bits: the last 3 bits of every position are padding and must be 0",
    ),
]

LATENTS: list[Row] = [
    (lambda: PackedLatents([1], SHAPE), TypeError, "packed: expected a torch.Tensor, got list"),
    (lambda: PackedLatents(torch.zeros(1, 4, 2), SHAPE), TypeError, "packed: expected dtype uint8, got float32"),
    (
        lambda: PackedLatents(packed(1, 4, 3), SHAPE),
        ValueError,
        r"packed: expected shape \(B, 4, 2\) for latents of \(4, 13\) bits, got \(1, 4, 3\)",
    ),
    (lambda: PackedLatents(packed(4, 2), SHAPE), ValueError, r"packed: expected shape \(B, 4, 2\) .*, got \(4, 2\)"),
    (lambda: PackedLatents(packed(4, 1), ()), ValueError, "shape: expected at least the number of channels"),
    (lambda: PackedLatents(packed(4, 2), (13.0,)), TypeError, "shape: expected an int, got float"),
    (lambda: PackedLatents(packed(4, 2), (-13,)), ValueError, "shape: expected 0 <= shape .*, got -13"),
    (
        lambda: PackedLatents(packed(1, 4, 2) + 32, SHAPE),
        ValueError,
        "packed: the last 3 bits of every position are padding and must be 0",
    ),
    (lambda: PackedLatents.from_bits([[1]]), TypeError, "bits: expected a torch.Tensor, got list"),
    (lambda: PackedLatents.from_bits(torch.zeros(3)), ValueError, r"bits: expected at least 2 dimensions, got shape \(3,\)"),
    (lambda: PackedLatents.from_bits(torch.zeros(3, 4), dim=2), ValueError, "dim: expected -2 <= dim <= 1, got 2"),
    (lambda: PackedLatents.from_bits(torch.zeros(3, 4), dim=0), ValueError, r"dim: expected .*, got 0 \(the sample\)"),
    (
        lambda: latents().to_bits(torch.complex64),
        TypeError,
        "dtype: expected a bool, integer or floating dtype, got",
    ),
    (lambda: latents().to_bits(dim=3), ValueError, "dim: expected -3 <= dim <= 2, got 3"),
    (lambda: latents()[3], IndexError, r"index: expected within -3..2, got 3"),
    (lambda: latents() ^ latents(2), ValueError, r"other: expected 3 latents, or one, of \(4, 13\) bits, got PackedLatents\(2 x"),
    (lambda: latents() ^ latents(3, (4, 14)), ValueError, r"other: expected 3 latents, .* of \(4, 13\) bits, got .*\(4, 14\)"),
    (lambda: latents() ^ latents().packed, TypeError, "unsupported operand"),
    (lambda: latents().hamming(latents(2)), ValueError, r"other: expected 3 latents, or one, .* got PackedLatents\(2 x"),
    (lambda: latents().hamming(latents().packed), TypeError, "other: expected PackedLatents, got Tensor"),
]

GRID: list[Row] = [
    (lambda: draw_grid([IMAGES]), TypeError, "images: expected a torch.Tensor, got list"),
    (lambda: draw_grid(IMAGES.byte()), TypeError, "images: expected dtype .*, got uint8"),
    (lambda: draw_grid(IMAGES[0]), ValueError, r"images: expected \(B >= 1, 1 or 3, H, W\), got \(1, 4, 4\)"),
    (lambda: draw_grid(IMAGES[:0]), ValueError, r"images: expected \(B >= 1, 1 or 3, H, W\), got \(0, 1, 4, 4\)"),
    (lambda: draw_grid(torch.zeros(2, 2, 4, 4)), ValueError, r"images: expected .*, got \(2, 2, 4, 4\)"),
    (lambda: draw_grid(IMAGES, ["one"]), ValueError, "captions: expected 2, got 1"),
    (lambda: draw_grid(IMAGES, columns=0), ValueError, "columns: expected 1 <= columns .*, got 0"),
]

MODEL = tiny_model()
MODELS: list[Row] = [
    (lambda: MODEL.sample(2, 17), ValueError, "steps: expected 1 <= steps <= 16, got 17"),
    (lambda: MODEL.sample(2, 2, guidance_scale=2.0), ValueError, "guidance_scale: 2.0 needs a condition, but cond is None"),
    (lambda: MODEL.sample(2, 2, labels=3), ValueError, "labels: expected classes 0..2, got 3"),
    (lambda: MODEL.sample(2, 2, labels=torch.tensor([0, -1])), ValueError, "labels: expected classes 0..2, got -1"),
    (lambda: MODEL.sample(2, 2, labels=torch.zeros(2)), TypeError, "labels: expected dtype int64, got float32"),
    (
        lambda: MODEL.sample(2, 2, labels=torch.tensor([0])),
        ValueError,
        "cond: expected 2 conditions, one a sample",
    ),
    (lambda: tiny_model(None).sample(2, 2, labels=0), ValueError, "labels: this model has no classes"),
    (lambda: MODEL.sampler(rule="best"), ValueError, "rule: expected one of .*, got 'best'"),
    (lambda: MODEL.decode(torch.zeros(2, *MODEL.latent_shape)), TypeError, "expected dtype uint8, got float32"),
    (lambda: MODEL.decode(packed(2, 5, 5, 1)), ValueError, r"\(2, 5, 5, 1\)"),
    (lambda: MODEL.encode(torch.zeros(2, 3, 28, 28)), ValueError, r"images: .*\(2, 3, 28, 28\)"),
    (lambda: MODEL.encode(torch.zeros(2, 1, 28, 28).byte()), TypeError, "images: .*uint8"),
    (lambda: tiny_model().from_pretrained(Path("nowhere")), FileNotFoundError, "model: no folder nowhere"),
    (lambda: model_with(schedule="quadratic"), ValueError, "kind|schedule"),
    (lambda: model_with(num_steps=0), ValueError, "num_steps: expected 1 <= num_steps .*, got 0"),
    (lambda: model_with(prediction="noise"), ValueError, "prediction: expected one of 'flip', 'x_0', got 'noise'"),
    (lambda: model_with(class_names=["one"], denoiser={}), ValueError, "class_names: expected 0 names, .*, got 1"),
    (lambda: model_with(class_names=["one", "two"]), ValueError, "class_names: expected 3 names, one a class, got 2"),
]


def model_with(**options: Any) -> bldm.BinaryLatentDiffusion:
    return bldm.BinaryLatentDiffusion(**{**MODEL._hub_mixin_config, **options})


ROWS = {"sampler": SAMPLER, "sample": SAMPLE, "latents": LATENTS, "grid": GRID, "models": MODELS}
ALL = [pytest.param(*row, id=f"{name}-{row[2][:50]}") for name, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("call, error, message", ALL)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error
