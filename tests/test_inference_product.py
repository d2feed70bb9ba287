"""The fused products of the inference engine: the plain form against float64 modules, the kernel against the plain form."""

from typing import Any

import pytest
import torch
from bldm_kernels.inference.attention import E4M3, to_e4m3
from bldm_kernels.inference.embed import row_moments
from bldm_kernels.inference.product import Stream, add_product, plain, prepare, product, stream, supports
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 48, 32), (70, 96, 64), (130, 272, 208), (257, 64, 1552), (600, 144, 128)]  # rows, N, K
if DEVICE == "cuda":
    SHAPES += [(257, 768, 3072), (2056, 2304, 768), (5000, 784, 768), (16448, 3072, 768)]


@pytest.fixture
def triton_kernels() -> Any:
    if bk.backends()["triton"].unavailable is not None:
        pytest.skip("Triton is not there")
    with bk.use_backend("triton"):
        yield


def layer(rows: int, columns: int, seed: int = 0) -> tuple[nn.Linear, nn.LayerNorm, Tensor]:
    """Linear, the norm before it and the scale behind it, none of them trivial."""
    g = torch.Generator().manual_seed(seed)
    linear, norm = nn.Linear(columns, rows), nn.LayerNorm(columns)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=g) / columns**0.5)
        for vector in (linear.bias, norm.bias):
            vector.copy_(torch.randn(len(vector), generator=g) * 0.3)
        norm.weight.copy_(1 + 0.2 * torch.randn(columns, generator=g))
    return linear.to(DEVICE), norm.to(DEVICE), (0.5 + torch.rand(rows, generator=g)).to(DEVICE)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of several sizes, with a mean."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=g) * torch.logspace(-1, 1, rows)[:, None] + 0.3
    return x.to(dtype).to(DEVICE)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
def test_plain_form_is_the_modules(gelu: bool) -> None:
    linear, norm, gamma = layer(24, 40)
    x = inputs(9, 40, torch.float64)
    weights = prepare(linear, torch.float64, norm=norm, gamma=gamma)
    y = linear.double()(norm.double()(x)) * gamma
    expected = F.gelu(y) if gelu else y
    # bias, sums and moments of a prepared layer are float32
    assert error(plain(x, weights, row_moments(x, 4), gelu, None), expected) < 1e-6
    h = torch.randn_like(expected)
    assert error(plain(x, weights, row_moments(x, 1), gelu, h), expected + h) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_of_a_norm_and_a_layer(shape: tuple[int, int, int], low: bool, triton_kernels: None) -> None:
    rows, columns, inner = shape
    linear, norm, _ = layer(columns, inner)
    h = inputs(rows, inner)
    scale = torch.tensor([0.05], device=DEVICE) if low else None
    weights = prepare(linear, torch.bfloat16, norm=norm, input_scale=scale)
    x = h if scale is None else to_e4m3(h, scale)
    moments = row_moments(h, 1 if inner % 3 else 1)
    assert supports(x, weights)
    expected = plain(x if low else x.double(), weights, moments, False, None)
    assert error(product(x, weights, moments=moments), expected) < 3e-3
    out_scale = torch.tensor([0.02], device=DEVICE)
    with_gelu = plain(x if low else x.double(), weights, moments, True, None)
    got = product(x, weights, moments=moments, gelu=True, out_scale=out_scale)
    assert got.dtype == E4M3
    assert error(got.float() * out_scale, to_e4m3(with_gelu.float(), out_scale).float() * out_scale) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_that_adds_to_the_stream(shape: tuple[int, int, int], low: bool, triton_kernels: None) -> None:
    rows, columns, inner = shape
    linear, _, gamma = layer(columns, inner)
    x = inputs(rows, inner)
    scale = torch.tensor([0.05], device=DEVICE) if low else None
    weights = prepare(linear, torch.bfloat16, gamma=gamma, input_scale=scale)
    x = x if scale is None else to_e4m3(x, scale)
    h = inputs(rows, columns)
    expected = plain(x if low else x.double(), weights, None, False, h)
    low_scale = torch.tensor([0.1], device=DEVICE)
    results = []
    for _ in range(2):
        mine = h.clone()
        results.append(add_product(x, weights, Stream(mine, row_moments(mine, 1)), low_scale=low_scale if low else None))
        assert results[-1].h.data_ptr() == mine.data_ptr()
    one, two = results
    assert torch.equal(one.h, two.h) and torch.equal(one.moments, two.moments)  # whoever adds the parts up
    assert error(one.h, expected) < 3e-3
    torch.testing.assert_close(one.moments.sum(1), row_moments(one.h, 1).sum(1), rtol=1e-5, atol=1e-3)
    if low:
        assert one.low is not None and error(one.low.float() * low_scale, to_e4m3(one.h, low_scale).float() * low_scale) < 1e-6
    else:
        assert one.low is None


@torch.no_grad()
def test_what_the_kernel_does_not_take_is_plain(triton_kernels: None) -> None:
    linear, norm, _ = layer(24, 20)
    weights = prepare(linear, torch.bfloat16, norm=norm)
    x = inputs(7, 20)
    assert not supports(x, weights)
    expected = linear(norm(x.float()))
    assert error(product(x, weights, moments=row_moments(x, 1)), expected) < 1e-2
    added = add_product(inputs(7, 20), prepare(linear, torch.bfloat16), stream(inputs(7, 24)))
    assert error(added.h, linear(x.float()) + inputs(7, 24).float()) < 1e-2


def test_errors_name_the_argument() -> None:
    linear, norm, _ = layer(32, 48)
    weights, normed = prepare(linear, torch.bfloat16), prepare(linear, torch.bfloat16, norm=norm)
    x = inputs(6, 48)
    with pytest.raises(ValueError, match=r"x: expected a contiguous \(M, 48\)"):
        product(inputs(6, 32), weights)
    with pytest.raises(ValueError, match="moments: expected with a folded norm"):
        product(x, normed)
    with pytest.raises(ValueError, match=r"moments: expected a contiguous \(6, parts, 2\)"):
        product(x, normed, moments=torch.zeros(5, 1, 2, device=DEVICE))
    with pytest.raises(TypeError, match="x: "):
        product(x.int(), weights)
    with pytest.raises(ValueError, match=r"to.h: expected a contiguous \(6, 32\)"):
        add_product(x, weights, stream(inputs(5, 32)))
