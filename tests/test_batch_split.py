"""The same seed gives the same bits for any batch split and on every backend."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from targets import Target
from torch import Tensor

import bldm_kernels as bk

SPLITS = {"1x64": [1] * 64, "64x1": [64], "7+57": [7, 57]}
SAMPLES, ROWS, CHANNELS = 64, 6, 20
FIRST = 2**32 - 30  # the sample index crosses 32 bits inside the batch


def make_inputs(samples: int, rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(samples, rows, channels, generator=generator) * 2
    bits = bk.reference.pack_bits(torch.rand(samples, rows, channels, generator=generator) < 0.5)
    return logits, bits, torch.rand(samples, generator=generator)


def draw_random_bits(logits: Tensor, bits: Tensor, p: Tensor, offset: int) -> Tensor:
    shape = logits.shape[1:]
    return bk.random_bits(len(logits), shape, seed=11, sample_offset=offset, device=logits.device)


def draw_flip_step(logits: Tensor, bits: Tensor, p: Tensor, offset: int) -> Tensor:
    coefficients = torch.stack([p / 2, 1 - p, torch.ones_like(p), torch.zeros_like(p)], dim=-1)
    return bk.flip_step(logits, bits, coefficients, seed=12, step=3, sample_offset=offset, temperature=0.9)


def draw_add_noise(logits: Tensor, bits: Tensor, p: Tensor, offset: int) -> Tensor:
    return bk.add_noise(bits, p, seed=13, step=9, sample_offset=offset, num_bits=logits.shape[-1])


def draw_binarize(logits: Tensor, bits: Tensor, p: Tensor, offset: int) -> Tensor:
    return bk.binarize(logits, seed=14, sample_offset=offset)


DRAWS = [draw_random_bits, draw_flip_step, draw_add_noise, draw_binarize]
Draw = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def draw_in_parts(draw: Draw, device: str, sizes: list[int]) -> Tensor:
    inputs = [x.to(device) for x in make_inputs(sum(sizes), ROWS, CHANNELS)]
    parts, start = [], 0
    for size in sizes:
        parts.append(draw(*[x[start : start + size] for x in inputs], FIRST + start))
        start += size
    return torch.cat(parts).cpu()


@cache
def reference_bits(draw: Draw, samples: int, rows: int, channels: int) -> Tensor:
    with bk.use_backend("torch"):
        return draw(*make_inputs(samples, rows, channels), FIRST)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("draw", DRAWS, ids=lambda d: d.__name__.removeprefix("draw_"))
def test_any_split_gives_the_same_bits(target: Target, draw: Draw, split: str) -> None:
    expected = reference_bits(draw, SAMPLES, ROWS, CHANNELS)
    assert torch.equal(draw_in_parts(draw, target.device, SPLITS[split]), expected)


@pytest.mark.parametrize("draw", DRAWS, ids=lambda d: d.__name__.removeprefix("draw_"))
def test_all_backends_agree_on_a_million_bits(target: Target, draw: Draw) -> None:
    """About 15 of these bits are decided by the tie block. In Triton's interpreter one op has to do for all."""
    samples = 61 if target.fast or draw is draw_flip_step else 7
    shape = (samples, 256, 64)
    got = draw(*[x.to(target.device) for x in make_inputs(*shape)], FIRST)
    differing = int(bk.reference.unpack_bits(got.cpu() ^ reference_bits(draw, *shape), 64).sum())
    assert differing == 0, f"{differing} of {samples * 256 * 64} bits differ from the reference"


def test_any_number_of_threads_gives_the_same_bits(cpu_backend: None) -> None:
    inputs = make_inputs(5, 333, 100)
    before = torch.get_num_threads()
    try:
        for draw in DRAWS:
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(draw(*inputs, FIRST))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


def test_batches_of_other_seeds_steps_and_samples_differ(target: Target) -> None:
    x = torch.zeros(2, 64, 8, dtype=torch.uint8, device=target.device)
    first = bk.add_noise(x, 0.5, seed=1, step=2)
    draws = [
        bk.add_noise(x, 0.5, seed=2, step=2),
        bk.add_noise(x, 0.5, seed=1 + 2**32, step=2),
        bk.add_noise(x, 0.5, seed=1, step=3),
        bk.add_noise(x, 0.5, seed=1, step=2, sample_offset=2),
        bk.add_noise(x, 0.5, seed=1, step=2, sample_offset=2**32),
        first.flip(0),
    ]
    for other in draws:
        assert 3700 < int(bk.hamming_distance(first, other).sum()) < 4500  # 4096 expected of 8192 bits, s.d. 45
