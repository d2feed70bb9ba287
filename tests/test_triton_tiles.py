"""Triton's programs that go over several tiles, which only large batches get otherwise, and back to their open bytes."""

import pytest
import torch
from targets import HAS_GPU

import bldm_kernels as bk

pytest.importorskip("triton")

ROWS = 37


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from bldm_kernels.backends.triton import flip_step

    monkeypatch.setattr(flip_step, "BLOCK", 64)
    monkeypatch.setattr(flip_step, "PROGRAMS", 1)
    grid, tiles = flip_step._grid(2, ROWS * 8)
    assert tiles["TILES"] > 1 and grid[0] == 2


@pytest.mark.parametrize("num_bits", [64, 61])
def test_flip_step_goes_back_to_bytes_with_a_non_finite_logit(num_bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, ROWS, num_bits, generator=generator)
    logits[0, 1, 2], logits[0, 36, 60], logits[1, 20, 7] = float("inf"), float("-inf"), float("inf")
    x_t = bk.reference.pack_bits(torch.rand(2, ROWS, num_bits, generator=generator) < 0.5)
    coefficients = torch.tensor([[0.25, 0.5, 1.0, 0.0], [0.1, 0.3, 1.0, -0.5]])

    def step(device: str) -> tuple[torch.Tensor, int]:
        count = torch.zeros(1, dtype=torch.int32, device=device)
        out = x_t.to(device, copy=True)  # in place: a byte is read again after its neighbours were written
        bk.flip_step(logits.to(device), out, coefficients.to(device), seed=5, step=6, nonfinite=count, out=out)
        return out.cpu(), int(count)

    with bk.use_backend("torch"):
        expected = step("cpu")
    with bk.use_backend("triton"):
        got = step("cuda" if HAS_GPU else "cpu")
    assert expected[1] == 3 and got[1] == 3
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("num_bits", [64, 61])
def test_add_noise_goes_back_to_ties(num_bits: int) -> None:
    """The probabilities share their upper 16 bits with the uniform number of one bit in each sample."""
    zero, seed = torch.tensor(0), torch.tensor(8)
    lanes = bk.reference.random_lanes(2, ROWS * 8, bk.reference.PURPOSE_ADD_NOISE, seed, zero, 0, torch.device("cpu"))
    p = ((torch.stack([lanes[0, 3, 2], lanes[1, 250, 6]]) + 0.5) / 2**16).float()
    x_0 = torch.zeros(2, ROWS, 8, dtype=torch.uint8)

    def noisy(device: str) -> torch.Tensor:
        return bk.add_noise(x_0.to(device), p.to(device), seed=int(seed), num_bits=num_bits).cpu()

    with bk.use_backend("torch"):
        expected = noisy("cpu")
    with bk.use_backend("triton"):
        assert torch.equal(noisy("cuda" if HAS_GPU else "cpu"), expected)
