"""The fused products of the inference engine: the plain form against float64 modules, the kernel against the plain form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference.attention import E4M3, to_e4m3
from bldm_kernels.inference.norm import normalize
from bldm_kernels.inference.norm import supports as norm_supports
from bldm_kernels.inference.product import add_product, plain, prepare, product, supports
from bldm_kernels.inference.triton import norm as norm_kernels

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
    h, offset = inputs(9, 40, torch.float64), torch.linspace(-1, 1, 40, device=DEVICE)
    weights = prepare(linear.double(), torch.float64, norm=norm.double(), gamma=gamma)
    y = linear(norm(h + offset)) * gamma
    assert error(plain(normalize(h, norm.eps, offset=offset), weights, gelu), F.gelu(y) if gelu else y) < 1e-12
    stream = torch.randn(9, 24, dtype=torch.float64, device=DEVICE)
    expected = stream + plain(h, weights) - weights.bias
    assert error(add_product(h, weights, stream), expected) < 1e-12  # the bias is the caller's


@torch.no_grad()
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (7, 40), (130, 768), (1100, 272), (3, 5000)])
def test_normalize(shape: tuple[int, int], many: bool, triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        monkeypatch.setattr(norm_kernels, "MANY_ROWS", 0)
    h, offset = inputs(*shape), torch.linspace(-2, 1, shape[1], device=DEVICE)
    assert norm_supports(h)
    expected = F.layer_norm(h.double() + offset, shape[1:])
    assert error(normalize(h, 1e-5, offset=offset), expected) < 3e-3
    assert error(normalize(h, 1e-5), F.layer_norm(h.double(), shape[1:])) < 3e-3
    scale = torch.tensor([0.02], device=DEVICE)
    low = normalize(h, 1e-5, offset=offset, out_scale=scale)
    assert low.dtype == E4M3 and error(low.float() * scale, to_e4m3(expected.float(), scale).float() * scale) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_of_a_layer(shape: tuple[int, int, int], low: bool, triton_kernels: None) -> None:
    rows, columns, inner = shape
    linear, norm, _ = layer(columns, inner)
    scale = torch.tensor([0.02], device=DEVICE) if low else None
    weights = prepare(linear, torch.bfloat16, norm=norm, input_scale=scale)
    x = inputs(rows, inner) if scale is None else to_e4m3(inputs(rows, inner), scale)
    exact = x if low else x.double()
    assert supports(x, weights)
    assert error(product(x, weights), plain(exact, weights)) < 3e-3
    assert error(product(x, weights, gelu=True), plain(exact, weights, gelu=True)) < 3e-3
    out_scale = torch.tensor([0.1], device=DEVICE)
    got, expected = product(x, weights, gelu=True, out_scale=out_scale), plain(exact, weights, gelu=True)
    assert got.dtype == E4M3
    assert error(got.float() * out_scale, to_e4m3(expected.float(), out_scale).float() * out_scale) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_that_adds_to_the_stream(shape: tuple[int, int, int], low: bool, triton_kernels: None) -> None:
    rows, columns, inner = shape
    linear, _, gamma = layer(columns, inner)
    scale = torch.tensor([0.02], device=DEVICE) if low else None
    weights = prepare(linear, torch.bfloat16, gamma=gamma, input_scale=scale)
    x = inputs(rows, inner) if scale is None else to_e4m3(inputs(rows, inner), scale)
    h = inputs(rows, columns)
    expected = plain(x if low else x.double(), weights, bias=False) + h
    one, two = h.clone(), h.clone()
    assert add_product(x, weights, one) is one
    assert error(one, expected) < 3e-3
    assert torch.equal(one, add_product(x, weights, two))


@torch.no_grad()
def test_what_the_kernels_do_not_take_is_plain(triton_kernels: None) -> None:
    linear, norm, _ = layer(24, 20)
    weights = prepare(linear, torch.bfloat16, norm=norm)
    h = inputs(7, 20)
    x = normalize(h, norm.eps)
    assert not supports(x, weights)
    assert error(product(x, weights), linear(norm(h.float()))) < 1e-2
    assert error(add_product(x, weights, inputs(7, 24)), plain(x, weights, bias=False) + inputs(7, 24)) < 1e-2


def test_errors_name_the_argument() -> None:
    linear, _, _ = layer(32, 48)
    weights = prepare(linear, torch.bfloat16)
    x = inputs(6, 48)
    with pytest.raises(ValueError, match=r"x: expected a contiguous \(M, 48\)"):
        product(inputs(6, 32), weights)
    with pytest.raises(TypeError, match="x: "):
        product(x.int(), weights)
    with pytest.raises(ValueError, match=r"h: expected a contiguous \(6, 32\)"):
        add_product(x, weights, inputs(5, 32))
    with pytest.raises(ValueError, match=r"h: expected a contiguous \(M, W\)"):
        normalize(x[None], 1e-5)
    with pytest.raises(ValueError, match="out_scale: expected one element"):
        product(x, weights, out_scale=torch.ones(32, device=DEVICE))
    with pytest.raises(TypeError, match="out_scale: "):
        normalize(x, 1e-5, out_scale=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offset: "):
        normalize(x, 1e-5, offset=torch.zeros(47, device=DEVICE))
