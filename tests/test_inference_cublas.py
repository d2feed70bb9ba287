"""cuBLASLt's products in e4m3, called by its C interface."""

import ctypes
from typing import Any

import pytest
import torch
from targets import HAS_GPU
from torch import Tensor, nn

from bldm_kernels.inference import cublas
from bldm_kernels.inference.attention import E4M3, E4M3_MAX, to_e4m3
from bldm_kernels.inference.product import Weights, add_product, plain, prepare, product

DEVICE = "cuda" if HAS_GPU else "cpu"
WIDTH = 768


def test_the_result_of_the_heuristic_has_the_size_of_the_c_structure() -> None:
    assert ctypes.sizeof(cublas.Heuristic) == 64 + 8 + 4 + 4 + 4 * 4


def test_not_on_a_cpu() -> None:
    assert not cublas.available(torch.device("cpu"))


def test_errors_name_the_function_and_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 7

    monkeypatch.setattr(cublas, "library", Broken)
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescCreate: status 7"):
        cublas.made("MatmulDescCreate", 68, 0)


@pytest.fixture
def on_gpu() -> None:
    if not HAS_GPU or not cublas.available(torch.device("cuda")):
        pytest.skip("needs a GPU with products in e4m3")


def layer(columns: int, inner: int) -> Weights:
    torch.manual_seed(columns + inner)
    return prepare(nn.Linear(inner, columns).to(DEVICE), torch.bfloat16, input_scale=torch.full((1,), 0.01, device=DEVICE))


def inputs(rows: int, inner: int) -> Tensor:
    return to_e4m3(torch.randn(rows, inner, device=DEVICE), torch.full((1,), 0.01, device=DEVICE))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("rows", [1024, 2056, 16448, 1031])
@pytest.mark.parametrize("columns, inner", [(2304, 768), (768, 3072), (784, 272)])
def test_against_float64(rows: int, columns: int, inner: int) -> None:
    x, weights = inputs(rows, inner), layer(columns, inner)
    assert cublas.plan_of(cublas.kind_of(x, weights.weight, False, True, False, torch.bfloat16)) is not None
    exact = x.double() @ weights.weight.double().T * float(weights.input_scale * weights.weight_scale)  # type: ignore[operator]
    expected = exact + weights.bias.double()
    got = product(x, weights)
    assert got.dtype == torch.bfloat16 and error(got, expected) < 3e-3
    assert torch.equal(product(x, weights), got)
    activated = nn.functional.gelu(expected)
    scale = (activated.abs().max() / (E4M3_MAX / 2)).float().reshape(1)
    assert error(product(x, weights, gelu=True), activated) < 3e-3
    for inverse in (None, scale.reciprocal()):
        low = product(x, weights, gelu=True, out_scale=scale, out_inverse=inverse)
        assert low.dtype == E4M3 and error(low.double() * scale, activated) < 4e-2
    h = torch.randn(rows, columns, device=DEVICE).bfloat16()
    assert error(add_product(x, weights, h.clone()), exact + h.double()) < 3e-3


@pytest.mark.usefixtures("on_gpu")
def test_in_a_graph() -> None:
    x, read, add = inputs(2056, WIDTH), layer(4 * WIDTH, WIDTH), layer(WIDTH, 4 * WIDTH)
    scale, h = torch.full((1,), 0.02, device=DEVICE), torch.randn(2056, WIDTH, device=DEVICE).bfloat16()

    def both(h: Tensor) -> Tensor:
        return add_product(product(x, read, gelu=True, out_scale=scale), add, h)

    expected, graph, kept = both(h.clone()), torch.cuda.CUDAGraph(), h.clone()
    with torch.cuda.graph(graph):
        kept.copy_(h)
        both(kept)
    for _ in range(3):
        graph.replay()
        assert torch.equal(kept, expected)


@pytest.mark.usefixtures("on_gpu")
def test_few_rows_and_shapes_that_the_library_does_not_take_are_computed_all_the_same() -> None:
    for rows, columns, inner in ((17, 768, 768), (2000, 16, 16)):
        x, weights = inputs(rows, inner), layer(columns, inner)
        assert error(product(x, weights), plain(x, weights).double()) < 3e-3
