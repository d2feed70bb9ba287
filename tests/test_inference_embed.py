"""The token buffer of the inference engine against float64."""

import pytest
import torch
from targets import HAS_GPU

import bldm_kernels as bk
from bldm_kernels import reference
from bldm_kernels.inference.embed import embed_tokens, supports

DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = [(2, 2, 16, 64, 48, 1), (4, 2, 9, 12, 40, 2), (1, 1, 30, 100, 256, 2), (40, 40, 64, 7, 32, 1)]
LARGE = [(64, 64, 256, 64, 768, 1), (128, 64, 256, 64, 768, 2), (1, 1, 256, 64, 768, 1), (2, 2, 1024, 256, 1024, 2)]


@pytest.mark.parametrize("case", CASES + (LARGE if HAS_GPU else []), ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_against_float64(backend: str, case: tuple[int, ...]) -> None:
    samples, distinct, places, num_bits, width, extra = case
    torch.manual_seed(sum(case))
    packed = bk.random_bits(distinct, (places, num_bits), seed=1, device=DEVICE)
    weight = torch.randn(num_bits, width, device=DEVICE).bfloat16()
    positions = torch.randn(places, width, device=DEVICE)
    tokens = [torch.randn(rows, width, device=DEVICE).bfloat16() for rows in (1, samples)[:extra]]
    out = torch.full((samples, places + extra, width), torch.nan, device=DEVICE).bfloat16()
    with bk.use_backend(backend):
        assert supports(out, extra) == (backend == "triton")
        assert embed_tokens(packed, weight, positions, tokens, out) is out
    expected = reference.embed_bits(packed, weight.double(), None, True) + positions.double()
    error = (out[:, :places].double() - expected.repeat(samples // distinct, 1, 1)).abs()
    assert bool((error <= 2.0**-8 * expected.abs().repeat(samples // distinct, 1, 1) + 1e-4).all())  # half a unit of bfloat16
    for row, token in enumerate(tokens, places):
        assert torch.equal(out[:, row], token.expand(samples, -1))


def test_without_extra_tokens_or_in_float32_it_is_plain() -> None:
    packed, out = bk.random_bits(2, (4, 8), seed=0, device=DEVICE), torch.empty(2, 4, 16, device=DEVICE)
    with bk.use_backend("triton"):
        assert not supports(out, 1) and not supports(out.bfloat16(), 0)
        embed_tokens(packed, torch.eye(8, 16, device=DEVICE), torch.zeros(4, 16, device=DEVICE), [], out)
    assert torch.equal(out[..., :8], 2 * bk.unpack_bits(packed, 8) - 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"packed": torch.zeros(2, 4, 2, dtype=torch.uint8)}, ValueError, "weight: "),
        ({"packed": torch.zeros(3, 4, 1, dtype=torch.uint8)}, ValueError, "packed: "),
        ({"packed": torch.zeros(2, 5, 1, dtype=torch.uint8)}, ValueError, "packed: "),
        ({"weight": torch.zeros(8, 16).double()}, TypeError, "weight: "),
        ({"positions": torch.zeros(4, 17)}, ValueError, "positions: "),
        ({"extra_tokens": [torch.zeros(3, 16)]}, ValueError, r"extra_tokens\[0\]: "),
        ({"out": torch.zeros(2, 16, 5).mT}, ValueError, "out: .*contiguous"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], match: str) -> None:
    good: dict[str, object] = {
        "packed": torch.zeros(2, 4, 1, dtype=torch.uint8),
        "weight": torch.zeros(8, 16),
        "positions": torch.zeros(4, 16),
        "extra_tokens": [torch.zeros(1, 16)],
        "out": torch.zeros(2, 5, 16),
    }
    with pytest.raises(error, match=match):
        embed_tokens(**{**good, **change})  # type: ignore[arg-type]
