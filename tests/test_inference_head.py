"""The head of the inference engine: its logits against float64, its bits against flip_step on those logits."""

from typing import Any

import pytest
import torch
from targets import HAS_GPU
from torch import Tensor, nn

import bldm_kernels as bk
from bldm_kernels.inference.head import Head, fold_head, head_logits, head_step, supports

DEVICE = "cuda" if HAS_GPU else "cpu"
# samples, positions, extra tokens, bits, width
CASES = [(2, 16, 1, 64, 96), (3, 10, 2, 12, 40), (1, 64, 1, 7, 128), (2, 9, 1, 200, 64)]
LARGE = [(1, 256, 1, 64, 768), (8, 256, 2, 64, 768), (64, 256, 1, 64, 768), (2, 1024, 1, 256, 768), (40, 256, 1, 128, 512)]
COEFFICIENTS = torch.tensor([0.02, 0.5, 0.9, 0.3])


def _inputs(samples: int, places: int, extra: int, num_bits: int, width: int) -> tuple[Tensor, Head, nn.Sequential]:
    torch.manual_seed(samples + num_bits)
    h = (torch.randn(samples, places + extra, width) * 3 + 0.5).bfloat16().to(DEVICE)
    layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_bits)).double().to(DEVICE)
    nn.init.normal_(layers[0].weight, 1.0, 0.3), nn.init.normal_(layers[0].bias, 0.0, 0.3)
    nn.init.normal_(layers[1].weight, 0.0, 2 * width**-0.5)
    layers.requires_grad_(False)
    return h, fold_head(layers[0].weight, layers[0].bias, layers[1].weight, layers[1].bias), layers


@pytest.mark.parametrize("case", CASES + (LARGE if HAS_GPU else []), ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_logits_against_float64(backend: str, case: tuple[int, ...]) -> None:
    h, head, layers = _inputs(*case)
    with bk.use_backend(backend):
        assert supports(h, head) == (backend == "triton")
        got = head_logits(h, head, case[1])
    x = h[:, : case[1]].double()
    normed = nn.functional.layer_norm(x, x.shape[-1:])
    folded = normed @ head.weight.double().T + head.bias.double()  # of the rounded weights: exact but for float32
    assert got.dtype == torch.float32 and got.shape == folded.shape
    assert (got - folded).abs().max() < 2e-4 * folded.abs().max()
    expected = layers(x)
    assert (got - expected).norm() < 5e-3 * expected.norm()


def _options(case: tuple[int, ...], which: str) -> dict[str, Any]:
    samples, places, _, num_bits, _ = case
    packed = -(-num_bits // 8)
    generator = torch.Generator().manual_seed(1)

    def some_bytes(*shape: int) -> Tensor:
        return bk.pack_bits(torch.rand(*shape, num_bits, generator=generator) < 0.5).to(DEVICE)

    assert packed == some_bytes(1).shape[-1]
    if which == "plain":
        return {"seed": 3, "step": 5}
    if which == "everything":
        return {
            "seed": torch.tensor([2**40 + 1], device=DEVICE),
            "step": torch.tensor([7], device=DEVICE),
            "sample_offset": torch.tensor([2**33], device=DEVICE),
            "temperature": 0.7,
            "prediction": "x_0",
            "guidance_scale": torch.tensor([1.7], device=DEVICE),
            "keep_mask": some_bytes(places),
            "keep_bits": some_bytes(samples, places),
            "nonfinite": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        }
    return {"seed": 2**64 - 1, "step": 2**28 - 1, "sample_offset": 11, "guidance_scale": -0.5}


@pytest.mark.parametrize("which", ["plain", "everything", "guided"])
@pytest.mark.parametrize("case", CASES + (LARGE if HAS_GPU else []), ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bits_are_those_of_flip_step(backend: str, case: tuple[int, ...], which: str) -> None:
    """Exactly, given the logits; and rounding of the logits decides few of them."""
    h, head, _ = _inputs(*case)
    options, samples = _options(case, which), case[0]
    guided = "guidance_scale" in options
    uncond = h.flip(-1).contiguous() if guided else h
    x_t = bk.random_bits(samples, (case[1], case[3]), seed=9, device=DEVICE)
    coefficients = COEFFICIENTS.to(DEVICE)
    if which == "everything":
        coefficients = coefficients * torch.linspace(1, 1.5, samples, device=DEVICE)[:, None]
    with bk.use_backend(backend):
        rows = torch.cat([h, uncond]) if guided else h
        got = head_step(rows, head, x_t, coefficients, **options)
        logits = head_logits(rows, head, case[1])  # at once: PyTorch's products may round otherwise with other numbers of rows
    with bk.use_backend("torch"):
        spared = {**options, "nonfinite": torch.zeros(1, dtype=torch.int32, device=DEVICE)}
        if guided:
            spared["uncond_logits"] = logits[samples:]
        expected = bk.flip_step(logits[:samples], x_t, coefficients, **spared)
        exact = [head_logits(x.double(), head, case[1]) for x in (h, uncond)]
        if guided:
            spared["uncond_logits"] = exact[1]
        near = bk.flip_step(exact[0], x_t, coefficients, **spared)
    assert torch.equal(got, expected)
    assert not torch.equal(got, x_t)
    differing = int(bk.hamming_distance(got.flatten(1), near.flatten(1)).sum())
    assert differing <= 1 + 1e-4 * samples * case[1] * case[3]
    if "nonfinite" in options:
        assert options["nonfinite"].item() == 0


def test_exact_logits_give_exact_bits() -> None:
    """Rows of +-1 whose mean is 0, eps 0 and weights of few bits: every backend has the same logits, so the same bits."""
    torch.manual_seed(0)
    half = torch.randn(2, 17, 32).sign()
    h = torch.cat([half, -half], dim=-1).bfloat16().to(DEVICE)
    weight = torch.randint(-8, 9, (24, 64)).double().to(DEVICE) / 16
    ones = torch.ones(64, device=DEVICE)
    head = fold_head(ones, 0 * ones, weight, torch.arange(24, device=DEVICE) / 8, eps=0.0)
    x_t = bk.random_bits(2, (16, 24), seed=2, device=DEVICE)
    exact = h[:, :16].double() @ weight.T + torch.arange(24, device=DEVICE) / 8
    expected = bk.flip_step(exact.float(), x_t, COEFFICIENTS.to(DEVICE), seed=4, step=1)
    for backend in ("triton", "torch"):
        with bk.use_backend(backend):
            assert torch.equal(head_logits(h, head, 16).double(), exact)
            assert torch.equal(head_step(h, head, x_t, COEFFICIENTS.to(DEVICE), seed=4, step=1), expected)


def test_counts_nonfinite_logits_of_latent_positions_only() -> None:
    h, head, _ = _inputs(2, 16, 1, 12, 64)
    h[0, 3, 5], h[1, 16] = torch.nan, torch.inf
    x_t = bk.random_bits(2, (16, 12), seed=2, device=DEVICE)
    for backend in ("triton", "torch"):
        count = torch.full((1,), 100, dtype=torch.int32, device=DEVICE)
        with bk.use_backend(backend):
            out = head_step(h, head, x_t, COEFFICIENTS.to(DEVICE), seed=1, step=0, nonfinite=count)
        assert count.item() == 112
        assert bk.unpack_bits(out, 16)[..., 12:].eq(0).all()


def test_writes_in_place() -> None:
    h, head, _ = _inputs(2, 16, 1, 64, 64)
    x_t = bk.random_bits(2, (16, 64), seed=2, device=DEVICE)
    for backend in ("triton", "torch"):
        with bk.use_backend(backend):
            expected = head_step(h, head, x_t, COEFFICIENTS.to(DEVICE), seed=1, step=0)
            x = x_t.clone()
            assert head_step(h, head, x, COEFFICIENTS.to(DEVICE), seed=1, step=0, out=x) is x
            assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"h": torch.zeros(2, 64, 6).bfloat16().mT}, ValueError, "h: .*contiguous"),
        ({"h": torch.zeros(3, 6, 64).bfloat16()}, ValueError, "h: "),
        ({"h": torch.zeros(2, 3, 64).bfloat16()}, ValueError, "num_positions: "),
        ({"h": torch.zeros(2, 6, 32).bfloat16()}, ValueError, "head: "),
        ({"x_t": torch.zeros(2, 4, 3, dtype=torch.uint8)}, ValueError, "x_t: "),
        ({"x_t": torch.zeros(2, 8, dtype=torch.uint8)}, ValueError, "x_t: "),
        ({"coefficients": torch.zeros(3, 4)}, ValueError, "coefficients: "),
        ({"coefficients": torch.zeros(4).double()}, TypeError, "coefficients: "),
        ({"temperature": 0.0}, ValueError, "temperature: "),
        ({"prediction": "x0"}, ValueError, "prediction: "),
        ({"guidance_scale": 2.0}, ValueError, "h: expected 2 x 2 samples"),
        ({"keep_mask": torch.zeros(2, 4, 2, dtype=torch.uint8)}, ValueError, "keep_bits: "),
        ({"nonfinite": torch.zeros(1)}, TypeError, "nonfinite: "),
        ({"step": 2**28}, ValueError, "step: "),
        ({"out": torch.zeros(2, 4, 1, dtype=torch.uint8)}, ValueError, "out: "),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bad_input(backend: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    zeros = torch.zeros(64)
    good: dict[str, object] = {
        "h": torch.zeros(2, 6, 64).bfloat16(),
        "head": fold_head(zeros, zeros, torch.zeros(16, 64), torch.zeros(16)),
        "x_t": torch.zeros(2, 4, 2, dtype=torch.uint8),
        "coefficients": COEFFICIENTS,
        "seed": 0,
        "step": 0,
    }
    with bk.use_backend(backend if not HAS_GPU else "torch"), pytest.raises(error, match=match):
        head_step(**{**good, **change})  # type: ignore[arg-type]
