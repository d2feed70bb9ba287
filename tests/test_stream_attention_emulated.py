"""The kernel of attention to the residual stream on the emulated machine of tests/emulator, where it runs without a GPU: its
schedule, the layouts that it reads and writes, and its arithmetic against float64."""

import ctypes

import pytest
import torch
from emulated import build
from test_product_emulated import in_order, make_operand, scale_of
from torch import Tensor

from bldm_kernels.inference.attention import E4M3, plain

EPS = 1e-5


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulator"), "stream_attention.cpp")


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check(
    library: ctypes.CDLL,
    low: bool,
    samples: int,
    tokens: int,
    heads: int,
    k_bytes: int,
    clusters: int,
    seed: int = 0,
    low_out: bool = False,
    parts: int = 3,
) -> Tensor:
    """What it writes, once it has been held against float64."""
    depth = k_bytes if low else k_bytes // 2
    weights, weight_scale, w = make_operand(3 * heads * 64, depth, low, depth**-0.5)
    sizes, means = 0.5 + torch.rand(samples, tokens, 1), torch.randn(samples, tokens, 1)
    h = (torch.randn(samples, tokens, depth) * sizes + means).bfloat16()
    x, bias = h.double(), torch.randn(3 * heads * 64)
    moments = torch.stack([torch.stack([part.sum(-1), (part**2).sum(-1)], -1) for part in x.tensor_split(parts, -1)]).float()
    stream_scale = scale_of(x) if low else None
    stream = h if stream_scale is None else (x / stream_scale).to(E4M3)
    read = x if stream_scale is None else stream.double() * stream_scale
    reciprocal = (x.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    expected = plain(*(reciprocal * read @ w.T + bias).chunk(3, -1), heads, None, None)
    out_scale = scale_of(expected) if low_out else None
    out = torch.full((samples * tokens + 3, heads * 64), float("nan")).to(E4M3 if low_out else torch.bfloat16)
    memory = (stream, in_order(weights), stream_scale, weight_scale, bias, moments, out_scale, out)
    pointers = [ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()) for tensor in memory]
    sizes = [ctypes.c_long(n) for n in (samples, tokens, heads, depth, parts)]
    how = (ctypes.c_int(clusters), ctypes.c_uint(seed), ctypes.c_long(low))
    assert library.run(*how, *pointers, *sizes, ctypes.c_float(EPS)).decode() == ""
    got = out[:-3].view(samples, tokens, -1)
    assert out[-3:].float().isnan().all() and got.float().isfinite().all()
    values, limit = (got.double(), 1e-2) if out_scale is None else (got.double() * out_scale, 4e-2)
    assert error(values, expected) < limit
    for head in range(heads):
        columns = slice(64 * head, 64 * head + 64)
        assert error(values[..., columns], expected[..., columns]) < 1.5 * limit
    if tokens > 256:
        assert error(values[:, 256:], expected[:, 256:]) < 2 * limit
    return got


# Samples, tokens, heads, bytes of k, clusters: of one pair of heads and of several, stages that are used again.
SIZES = [(1, 257, 2, 384, 1), (2, 257, 4, 384, 3), (1, 256, 4, 768, 1), (2, 258, 2, 384, 1), (1, 264, 2, 384, 1)]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(emulated: ctypes.CDLL, size: tuple[int, int, int, int, int], low: bool) -> None:
    torch.manual_seed(sum(size))
    check(emulated, low, *size, seed=size[1], low_out=low)


def test_any_order_of_events(emulated: ctypes.CDLL) -> None:
    """Copies that end early or late, products that read early or late, clusters that take one pair of heads or several."""
    results = []
    for seed, clusters in ((1, 1), (2, 2), (3, 1)):
        torch.manual_seed(0)
        results.append(check(emulated, False, 1, 257, 4, 384, clusters, seed))
    assert all(torch.equal(results[0], other) for other in results)
