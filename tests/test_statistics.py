"""The bits behave like independent coin flips of the stated probability: rates over 10^8 bits, chi-square between neighbours.

All seeds are fixed, so these tests never fail by chance; they would fail on a broken counter layout, lane or tie rule.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import bldm_kernels as bk

CPU = bk.backends()["cpu"].unavailable is None
BITS = 10**8 if CPU else 10**6
CHANNELS, STEPS = 64, 96 if CPU else 1
SAMPLES = 64
ROWS = BITS // (STEPS * SAMPLES * CHANNELS)
# One probability a channel: 1e-6 .. 1 - 1e-6, dense near both ends and in the middle.
TAIL = torch.logspace(-6, -1.1, 20, dtype=torch.float64)
ENDS = TAIL.new_tensor([1e-4, 1 - 1e-4])
PROBABILITIES = torch.cat([TAIL, torch.linspace(0.08, 0.92, 22, dtype=torch.float64), 1 - TAIL.flip(0), ENDS])


def standard_errors(set_bits: Tensor, draws: int, p: Tensor) -> Tensor:
    return (set_bits.double() / draws - p) / torch.sqrt(p * (1 - p) / draws)


def count_channels(packed: Tensor) -> Tensor:
    """(..., P) -> (C,) set bits of every channel."""
    return bk.unpack_bits(packed, CHANNELS, torch.uint8).view(-1, CHANNELS).sum(0, dtype=torch.int64)


def test_flip_rates_match_their_probabilities() -> None:
    """x_0 = x_t with probability f: the rule `sample`, so that P is the sigmoid of the logit and nothing else."""
    assert PROBABILITIES.numel() == CHANNELS
    logits = torch.logit(PROBABILITIES).float().expand(SAMPLES, ROWS, CHANNELS).contiguous()
    p = torch.sigmoid(logits[0, 0].double())
    x_t = bk.random_bits(SAMPLES, (ROWS, CHANNELS), seed=1)
    coefficients = bk.BernoulliSchedule().coefficients([1], "sample", "sample")[0]
    total = torch.zeros(CHANNELS, dtype=torch.int64)
    for step in range(STEPS):
        total += count_channels(x_t ^ bk.flip_step(logits, x_t, coefficients, seed=2, step=step))
    errors = standard_errors(total, STEPS * SAMPLES * ROWS, p)
    assert float(errors.abs().max()) < 5, errors
    assert 0.6 < float(errors.std()) < 1.5  # and they are neither too large nor too good to be true


@pytest.mark.parametrize("rule", ["plugin", "marginal"])
def test_flip_rates_of_a_reverse_step(rule: str) -> None:
    """The same for a real step, against the probabilities of float64."""
    logits = torch.logit(PROBABILITIES).float().expand(SAMPLES, ROWS, CHANNELS).contiguous()
    x_t = bk.random_bits(SAMPLES, (ROWS, CHANNELS), seed=1)
    coefficients = bk.BernoulliSchedule("linear", 64).coefficients([48, 44], rule)[0]
    p = bk.flip_probability(logits[:1, :1].double(), x_t[:1, :1], coefficients).flatten()
    rounds = max(STEPS // 8, 1)
    total = torch.zeros(CHANNELS, dtype=torch.int64)
    for step in range(rounds):
        total += count_channels(x_t ^ bk.flip_step(logits, x_t, coefficients, seed=3, step=step))
    errors = standard_errors(total, rounds * SAMPLES * ROWS, p)
    assert float(errors.abs().max()) < 5, errors


@pytest.mark.parametrize("p", [1e-6, 1e-4, 0.01, 0.5, 0.9, 1 - 1e-4])
def test_noise_rates(p: float) -> None:
    x_0 = torch.zeros(SAMPLES, BITS // 10 // SAMPLES // CHANNELS + 1, CHANNELS // 8, dtype=torch.uint8)
    flipped = count_channels(bk.add_noise(x_0, p, seed=4)).sum()
    exact = torch.tensor(p, dtype=torch.float32).double()
    assert abs(float(standard_errors(flipped, 8 * x_0.numel(), exact))) < 5


def bit_array(packed: Tensor) -> np.ndarray:
    return np.unpackbits(packed.numpy(), axis=-1, bitorder="little")


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """Chi-square of the 2 x 2 table of two bit arrays: neither dependent nor suspiciously balanced."""
    table = np.bincount((2 * a + b).ravel(), minlength=4).reshape(2, 2)
    p_value = stats.chi2_contingency(table, correction=False).pvalue
    assert 1e-4 < p_value < 1 - 1e-6, table


@pytest.fixture(scope="module")
def coin_flips() -> np.ndarray:
    """(samples, rows, bits) of fair flips."""
    rows = 256 if CPU else 32
    return bit_array(bk.random_bits(512, (rows, CHANNELS), seed=5))


@pytest.fixture(scope="module")
def biased_flips() -> np.ndarray:
    """(steps, samples, rows, bits) flipped with P = 0.3, where every bit of the uniform number matters."""
    rows = 64 if CPU else 8
    logits = torch.full((128, rows, CHANNELS), float(torch.logit(torch.tensor(0.3))))
    x_t = torch.zeros(128, rows, CHANNELS // 8, dtype=torch.uint8)
    coefficients = torch.tensor([0.0, 1.0, 1.0, 0.0])
    return np.stack([bit_array(bk.flip_step(logits, x_t, coefficients, seed=6, step=s)) for s in range(8)])


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 65])
def test_neighbouring_bits_are_independent(coin_flips: np.ndarray, biased_flips: np.ndarray, distance: int) -> None:
    """Bits of one block, lanes of one word, and bits of neighbouring bytes."""
    for flips in (coin_flips, biased_flips):
        line = flips.reshape(-1)
        assert_independent(line[:-distance], line[distance:])


@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbouring_bytes_are_independent(coin_flips: np.ndarray, distance: int) -> None:
    """All 65,536 pairs of values of two bytes, a chi-square of 255 x 255 degrees of freedom."""
    values = np.packbits(coin_flips, axis=-1, bitorder="little").reshape(-1).astype(np.int64)
    pairs = np.bincount(256 * values[:-distance] + values[distance:], minlength=65536)
    assert 1e-4 < stats.chisquare(pairs).pvalue < 1 - 1e-4


def test_bytes_are_uniform(coin_flips: np.ndarray) -> None:
    values = np.packbits(coin_flips, axis=-1, bitorder="little").reshape(-1)
    assert 1e-4 < stats.chisquare(np.bincount(values, minlength=256)).pvalue < 1 - 1e-4


@pytest.mark.parametrize("axis", ["step", "sample", "row"])
def test_neighbouring_draws_are_independent(biased_flips: np.ndarray, axis: str) -> None:
    moved = np.moveaxis(biased_flips, ["step", "sample", "row"].index(axis), 0)
    assert_independent(moved[:-1], moved[1:])
    assert_independent(moved[:1], moved[-1:])


def test_purposes_and_seeds_are_independent(coin_flips: np.ndarray) -> None:
    """The same counters under another purpose or the next seed are other numbers."""
    samples, rows, bits = coin_flips.shape
    zeros = torch.zeros(samples, rows, bits // 8, dtype=torch.uint8)
    noise = bit_array(bk.add_noise(zeros, 0.5, seed=5))
    coin = bit_array(bk.binarize(torch.zeros(samples, rows, bits), seed=5))
    next_seed = bit_array(bk.random_bits(samples, (rows, bits), seed=6))
    for other in (noise, coin, next_seed):
        assert_independent(coin_flips, other)
    assert_independent(noise, coin)
