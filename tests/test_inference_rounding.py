"""Weights behind a norm, rounded to rows that add up to 0; and products in e4m3 that are no shorter than the exact ones."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bldm_kernels.inference.attention import E4M3, to_e4m3
from bldm_kernels.inference.product import dequantized, plain, prepare
from bldm_kernels.inference.rounding import centred, round_centred
from bldm_kernels.inference.stream import prepare_reader


def weights_of(rows: int, columns: int, largest: float) -> Tensor:
    """Of rows of several sizes, with means."""
    torch.manual_seed(rows + columns)
    sizes = torch.logspace(-3, 0, rows, dtype=torch.float64)[:, None]
    weight = centred(torch.randn(rows, columns, dtype=torch.float64) * sizes + 0.3)
    return weight * (largest / weight.abs().max())


@pytest.mark.parametrize("dtype, largest", [(torch.bfloat16, 3.0), (E4M3, 448.0)])
@pytest.mark.parametrize("columns", [40, 768, 3072])
def test_rows_add_up_to_0_and_are_as_near(dtype: torch.dtype, largest: float, columns: int) -> None:
    weight = weights_of(50, columns, largest)
    nearest, rounded = weight.to(dtype).double(), round_centred(weight, dtype).double()
    error, least = (rounded - weight).norm(dim=1), (nearest - weight).norm(dim=1)
    assert rounded.isfinite().all()
    assert (error <= 1.1 * least).all() and error.norm() < 1.02 * least.norm()
    assert (rounded.sum(1).abs() < 0.2 * least).all()
    assert (nearest.sum(1).abs() > 0.2 * least).float().mean() > 0.5  # which rounding alone does not do


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_every_value_is_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    weight = weights_of(8, 200, 448.0)
    every = torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1))
    values = every.to(torch.int8 if dtype == E4M3 else torch.int16).view(dtype).double()
    values = values[values.isfinite()].unique()
    place = torch.searchsorted(values, weight.flatten())
    below, above = values[place - (weight.flatten() != values[place]).int()], values[place]
    rounded = round_centred(weight, dtype).double().flatten()
    assert ((rounded == below) | (rounded == above)).all()


def test_other_dtypes_are_rounded_as_usual_and_rows_of_zeros_stay() -> None:
    weight = weights_of(4, 30, 1.0)
    assert torch.equal(round_centred(weight, torch.float32), weight.float())
    assert round_centred(torch.zeros(3, 16, dtype=torch.float64), E4M3).float().eq(0).all()


def test_behind_a_norm_nothing_changes() -> None:
    torch.manual_seed(0)
    h, weight = torch.randn(7, 40, dtype=torch.float64) + 5, torch.randn(6, 40, dtype=torch.float64) + 0.2
    normal = F.layer_norm(h, (40,))
    torch.testing.assert_close(normal @ centred(weight).T, normal @ weight.T)
    r = (h.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(r * (h @ centred(weight).T), normal @ weight.T)


def test_a_row_of_one_large_value_is_taken() -> None:
    """Whose rounding no other value of its row makes up for."""
    linear, norm = torch.nn.Linear(64, 32), torch.nn.LayerNorm(64)
    with torch.no_grad():
        linear.weight.mul_(1e-4)[:, 3] = torch.linspace(0.5, 1, 32)
        weights = prepare(linear, torch.bfloat16, norm=norm, input_scale=torch.ones(1))
        reader = prepare_reader(weights, norm.eps, torch.ones(1))
    assert (dequantized(weights).sum(1).abs() > 2**-8 * dequantized(weights).norm(dim=1)).any() and reader.low


@pytest.mark.parametrize("spread", [0.0, 0.5])
@torch.no_grad()
def test_products_in_e4m3_have_as_much_in_common_with_the_exact_ones(spread: float) -> None:
    """In the mean: <y, q> = <y, y>, of which rounding both factors to the nearest takes 0.12%."""
    torch.manual_seed(0)
    x = torch.randn(4096, 256, dtype=torch.float64) * torch.exp(spread * torch.randn(4096, 256, dtype=torch.float64))
    linear, scale = torch.nn.Linear(256, 256), (x.abs().max() / 224).float().reshape(1)
    weights = prepare(linear, torch.bfloat16, input_scale=scale)
    exact, found = F.linear(x, linear.weight.double(), linear.bias.double()), plain(to_e4m3(x, scale), weights).double()
    assert abs((exact * found).sum() / exact.square().sum() - 1) < 3e-4
