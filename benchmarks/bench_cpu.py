"""CPU kernels against PyTorch and numpy, each checked before it is timed.

    make bench        (or: python -m pytest benchmarks/bench_cpu.py --benchmark-json=benchmarks/results/cpu.json)

1 M bits = 64 samples of 256 positions and 64 bits. `ns_per_bit` in the extra information is the median.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bldm.bench import plain

import bldm_kernels as bk

SHAPE = (64, 256, 64)
BITS = 64 * 256 * 64
SCHEDULE = bk.BernoulliSchedule("linear", 256)
TIMESTEPS = SCHEDULE.timesteps(16)
STEP = 8
KEPT = float(SCHEDULE.keep[TIMESTEPS[STEP + 1]])
KAPPA = float(SCHEDULE.keep[TIMESTEPS[STEP]]) / KEPT


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator)
    x_t = bk.random_bits(SHAPE[0], SHAPE[1:], seed=1)
    x_0 = bk.random_bits(SHAPE[0], SHAPE[1:], seed=2)
    weight = torch.randn(SHAPE[-1], 256, generator=generator)
    return {
        "logits": logits,
        "x_t": x_t,
        "x_0": x_0,
        "weight": weight,
        "coefficients": SCHEDULE.coefficients(TIMESTEPS)[STEP],
        "x_t_float": bk.unpack_bits(x_t, 64),
        "x_0_float": bk.unpack_bits(x_0, 64),
    }


def timed(benchmark, function: Callable[[], object], provider: str, op: str, rounds: int = 50) -> None:  # noqa: ANN001
    benchmark.group = op
    for _ in range(3):
        function()
    benchmark.pedantic(function, rounds=rounds, iterations=1)
    benchmark.extra_info.update(
        op=op, provider=provider, bits=BITS, threads=torch.get_num_threads(), ns_per_bit=benchmark.stats.stats.median * 1e9 / BITS
    )


def check_rate(flipped: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    """The number of flips must lie within 5 standard errors of the sum of the float64 probabilities."""
    p = plain.step_probability(state["logits"], state["x_t_float"], KEPT, KAPPA)
    deviation = (p * (1 - p)).sum().sqrt().item()
    assert abs(flipped.double().sum().item() - p.sum().item()) < 5 * deviation


@pytest.mark.parametrize("provider", ["cpu", "torch eager", "torch compile"])
def test_flip_step(benchmark, state, provider):  # noqa: ANN001
    if provider == "cpu":
        out = torch.empty_like(state["x_t"])
        nonfinite = torch.zeros(1, dtype=torch.int32)

        def run() -> torch.Tensor:
            return bk.flip_step(
                state["logits"], state["x_t"], state["coefficients"], seed=3, step=STEP, nonfinite=nonfinite, out=out
            )

        with bk.use_backend("cpu"):
            check_rate(bk.unpack_bits(run() ^ state["x_t"], 64), state)
            timed(benchmark, run, provider, "flip_step")
        return
    step = torch.compile(plain.step) if provider == "torch compile" else plain.step

    def run_plain() -> torch.Tensor:
        return step(state["logits"], state["x_t_float"], KEPT, KAPPA)

    check_rate(run_plain() != state["x_t_float"], state)
    timed(benchmark, run_plain, provider, "flip_step")


@pytest.mark.parametrize("provider", ["cpu", "torch eager"])
def test_add_noise(benchmark, state, provider):  # noqa: ANN001
    if provider == "cpu":
        p = torch.full((1,), 0.2)
        out = torch.empty_like(state["x_0"])
        with bk.use_backend("cpu"):
            noisy = bk.add_noise(state["x_0"], p, seed=3)
            rate = bk.hamming_distance(noisy, state["x_0"]).sum().item() / BITS
            assert abs(rate - 0.2) < 5 * (0.16 / BITS) ** 0.5
            timed(benchmark, lambda: bk.add_noise(state["x_0"], p, seed=3, out=out), provider, "add_noise")
        return
    timed(benchmark, lambda: plain.add_noise(state["x_0_float"], 0.6), provider, "add_noise")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("provider", ["cpu", "numpy"])
def test_pack_bits(benchmark, state, provider, dtype):  # noqa: ANN001
    bits = bk.unpack_bits(state["x_0"], 64, getattr(torch, dtype))
    array = bits.numpy()
    out = torch.empty_like(state["x_0"])
    with bk.use_backend("cpu"):
        assert np.array_equal(bk.pack_bits(bits).numpy(), np.packbits(array != 0, axis=-1, bitorder="little"))
        if provider == "cpu":
            timed(benchmark, lambda: bk.pack_bits(bits, out=out), provider, f"pack_bits {dtype}")
        elif dtype == "uint8":
            timed(benchmark, lambda: np.packbits(array, axis=-1, bitorder="little"), provider, f"pack_bits {dtype}")
        else:
            timed(benchmark, lambda: np.packbits(array != 0, axis=-1, bitorder="little"), provider, f"pack_bits {dtype}")


@pytest.mark.parametrize("provider", ["cpu", "numpy"])
def test_unpack_bits(benchmark, state, provider):  # noqa: ANN001
    array = state["x_0"].numpy()
    out = torch.empty(SHAPE)
    with bk.use_backend("cpu"):
        assert np.array_equal(bk.unpack_bits(state["x_0"], 64).numpy(), np.unpackbits(array, axis=-1, bitorder="little"))
        if provider == "cpu":
            timed(benchmark, lambda: bk.unpack_bits(state["x_0"], 64, out=out), provider, "unpack_bits float32")
        else:
            timed(
                benchmark,
                lambda: np.unpackbits(array, axis=-1, bitorder="little").astype(np.float32),
                provider,
                "unpack_bits float32",
            )


@pytest.mark.parametrize("provider", ["cpu", "torch eager"])
def test_flip_loss_and_gradient(benchmark, state, provider):  # noqa: ANN001
    logits = state["logits"].clone().requires_grad_()

    def packed() -> torch.Tensor:
        return torch.autograd.grad(bk.flip_loss(logits, state["x_0"], state["x_t"]), logits)[0]

    def unpacked() -> torch.Tensor:
        return torch.autograd.grad(plain.flip_loss(logits, state["x_0_float"], state["x_t_float"]), logits)[0]

    with bk.use_backend("cpu"):
        torch.testing.assert_close(packed(), unpacked(), rtol=1e-4, atol=1e-10)
        timed(benchmark, packed if provider == "cpu" else unpacked, provider, "flip_loss forward + backward")


@pytest.mark.parametrize("provider", ["cpu", "torch eager"])
def test_embed_bits(benchmark, state, provider):  # noqa: ANN001
    def packed() -> torch.Tensor:
        return bk.embed_bits(state["x_0"], state["weight"])

    def unpacked() -> torch.Tensor:
        return (2 * state["x_0_float"] - 1) @ state["weight"]

    with bk.use_backend("cpu"):
        torch.testing.assert_close(packed(), unpacked(), rtol=1e-4, atol=1e-4)
        timed(benchmark, packed if provider == "cpu" else unpacked, provider, "embed_bits 64 -> 256", rounds=20)


@pytest.mark.parametrize("provider", ["cpu", "torch eager"])
def test_hamming_distance(benchmark, state, provider):  # noqa: ANN001
    def unpacked() -> torch.Tensor:
        return (state["x_0_float"] != state["x_t_float"]).flatten(1).sum(1)

    with bk.use_backend("cpu"):
        assert torch.equal(bk.hamming_distance(state["x_0"], state["x_t"]).long(), unpacked())
        run = (lambda: bk.hamming_distance(state["x_0"], state["x_t"])) if provider == "cpu" else unpacked
        timed(benchmark, run, provider, "hamming_distance")
