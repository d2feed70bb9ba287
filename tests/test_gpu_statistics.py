"""Rates over 10^10 bits of every random op on the device, against the probabilities in float64, a channel each.

The seeds are fixed, so these tests never fail by chance. Independence of neighbours: test_statistics.py.
"""

from collections.abc import Iterator

import pytest
import torch
from conftest import require_backend, require_gpu
from test_statistics import CHANNELS, PROBABILITIES, standard_errors
from torch import Tensor

import bldm_kernels as bk

BATCH, ROWS = 8192, 512
ROUNDS = 38  # of 2.7e8 bits


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    require_gpu()
    require_backend(request.param)
    with bk.use_backend(request.param):
        yield


def count(packed: Tensor) -> Tensor:
    """(C,) set bits of every channel, exact: products with ones, at most 2^24 at a time."""
    bits = bk.unpack_bits(packed.view(-1, packed.shape[-1]), CHANNELS, torch.float32).view(-1, 2**16, CHANNELS)
    return bits.sum(1).to(torch.int64).sum(0)


def assert_rates(total: Tensor, p: Tensor) -> None:
    errors = standard_errors(total.cpu(), ROUNDS * BATCH * ROWS, p)
    assert float(errors.abs().max()) < 5, errors
    assert 0.6 < float(errors.std()) < 1.5  # neither too large nor too good to be true


def logits(dtype: torch.dtype) -> Tensor:
    return torch.logit(PROBABILITIES).to("cuda", dtype).expand(BATCH, ROWS, CHANNELS).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["sample", "plugin", "marginal"])
def test_flip_step(rule: str, dtype: torch.dtype) -> None:
    x = logits(dtype)
    x_t = bk.random_bits(BATCH, (ROWS, CHANNELS), seed=1, device="cuda")
    row = bk.BernoulliSchedule("linear", 64).coefficients([48, 44], rule)[0].cuda()
    with bk.use_backend("torch"):  # the one that knows float64
        p = bk.flip_probability(x[:1, :1].double(), x_t[:1, :1], row).flatten().cpu()
    total = torch.zeros(CHANNELS, dtype=torch.int64, device="cuda")
    for step in range(ROUNDS):
        total += count(x_t ^ bk.flip_step(x, x_t, row, seed=2, step=step))
    assert_rates(total, p)


def test_binarize() -> None:
    x = logits(torch.float32)
    total = torch.zeros(CHANNELS, dtype=torch.int64, device="cuda")
    for step in range(ROUNDS):
        total += count(bk.binarize(x, seed=3, step=step))
    assert_rates(total, torch.sigmoid(x[0, 0].double()).cpu())


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.5, 0.9])
def test_add_noise(p: float) -> None:
    x_0 = torch.zeros(BATCH, ROWS, CHANNELS // 8, dtype=torch.uint8, device="cuda")
    total = torch.zeros(CHANNELS, dtype=torch.int64, device="cuda")
    for step in range(ROUNDS):
        total += count(bk.add_noise(x_0, p, seed=4, step=step))
    assert_rates(total, torch.full((CHANNELS,), p, dtype=torch.float32).double())


def test_random_bits() -> None:
    total = torch.zeros(CHANNELS, dtype=torch.int64, device="cuda")
    for seed in range(ROUNDS):
        total += count(bk.random_bits(BATCH, (ROWS, CHANNELS), seed=seed, device="cuda"))
    assert_rates(total, torch.full((CHANNELS,), 0.5, dtype=torch.float64))
