"""Attention of the inference engine against float64."""

import pytest
import torch
from conftest import require_gpu
from targets import HAS_GPU
from torch import Tensor

import bldm_kernels as bk
from bldm_kernels.inference.attention import attention, cross_attention, plain, supports, supports_whole_heads
from bldm_kernels.inference.triton import attention as kernels

DEVICE = "cuda" if HAS_GPU else "cpu"
# Samples, tokens, heads, size of a head: a tile and less; a few tokens more than a power of two; keys that stream by in whole
# blocks and not, with a tail and without.
SHAPES = [(2, 1, 1, 32), (1, 5, 1, 32), (2, 17, 2, 32), (1, 66, 1, 32), (2, 65, 2, 64), (2, 257, 1, 64), (2, 258, 1, 64)]
SHAPES += [(1, 321, 1, 64), (1, 300, 1, 128)]
LARGE = [(2, 257, 12, 64), (8, 257, 12, 64), (64, 257, 12, 64), (1, 1025, 12, 64), (8, 257, 6, 128), (3, 4096, 2, 64)]


def _inputs(samples: int, tokens: int, heads: int, dim: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens + heads)
    qkv = (2 * torch.randn(samples, tokens, 3 * heads * dim, generator=generator)).bfloat16().to(DEVICE)
    if not masked:
        return qkv, None
    mask = torch.rand(samples, tokens, generator=generator) < 0.6
    mask[:, tokens // 2] = True
    mask[0, -1] = tokens == 1
    return qkv, mask.to(DEVICE)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture(params=["few", "many"])
def heads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were enough heads for large tiles."""
    if request.param == "many":
        monkeypatch.setattr(kernels, "MANY_HEADS", 1)


@pytest.mark.usefixtures("heads")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES + (LARGE if HAS_GPU else []), ids=str)
def test_against_float64(shape: tuple[int, int, int, int], masked: bool) -> None:
    qkv, mask = _inputs(*shape, masked)
    expected = plain(*qkv.double().chunk(3, -1), shape[2], mask, None)
    scale = (expected.abs().max() / 400).float().reshape(1)
    with bk.use_backend("triton"):
        assert supports(qkv, shape[2])
        got, low = attention(qkv, shape[2], mask), attention(qkv, shape[2], mask, scale)
    with bk.use_backend("torch"):
        assert not supports(qkv, shape[2])
        assert _relative(attention(qkv, shape[2], mask), expected) < 4e-3
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape and got.is_contiguous()
    assert _relative(got, expected) < 4e-3  # two roundings to bfloat16: of the probabilities and of the result
    assert low.dtype == torch.float8_e4m3fn
    assert _relative(low.double() * scale, expected) < 4e-2  # 4 significant bits


@pytest.mark.parametrize(
    "samples, tokens, heads", [(1, 257, 12), (8, 258, 12), (64, 257, 12), (3, 256, 5), (2, 272, 70)], ids=str
)
@pytest.mark.parametrize("pdl", [False, True])
def test_whole_heads_against_float64(samples: int, tokens: int, heads: int, pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    require_gpu()
    monkeypatch.setattr("bldm_kernels.inference.attention.MANY_WHOLE_HEADS", 1)  # also few
    qkv, _ = _inputs(samples, tokens, heads, 64, False)
    if not supports_whole_heads(qkv, heads, None):
        pytest.skip("the kernel is for compute capability 9.0")
    expected = plain(*qkv.double().chunk(3, -1), heads, None, None)
    scale = (expected.abs().max() / 400).float().reshape(1)
    got, low = attention(qkv, heads, pdl=pdl), attention(qkv, heads, None, scale, pdl=pdl)
    assert _relative(got, expected) < 4e-3 and _relative(got[:, 256:], expected[:, 256:]) < 4e-3 or tokens == 256
    assert _relative(low.double() * scale, expected) < 4e-2
    assert all(torch.equal(attention(qkv, heads, pdl=pdl), got) for _ in range(20))
    large = 1e4 * torch.nn.functional.one_hot(torch.arange(tokens) % 64, 64).bfloat16().repeat(samples, 1, 3 * heads).to(DEVICE)
    assert attention(large, heads).isfinite().all()


def test_scores_of_any_size() -> None:
    """Nothing overflows, and one key far above the others takes all, wherever it is: in a block or in the tail."""
    for key in (3, 64, 65):
        qkv = torch.zeros(1, 66, 3 * 32, dtype=torch.bfloat16, device=DEVICE)
        qkv[..., :32] = 100.0
        qkv[0, key, 32:64] = 100.0
        qkv[0, :, 64:] = torch.arange(66, device=DEVICE)[:, None]
        with bk.use_backend("triton"):
            assert attention(qkv, 1).eq(key).all()


def test_saturates_at_448() -> None:
    qkv = torch.full((1, 20, 3 * 32), 3.0, dtype=torch.bfloat16, device=DEVICE)
    for backend in ("triton", "torch"):
        with bk.use_backend(backend):
            assert attention(qkv, 1, out_scale=torch.full((1,), 1e-3, device=DEVICE)).float().eq(448).all()


@pytest.mark.usefixtures("heads")
def test_memory_of_any_alignment() -> None:
    qkv, _ = _inputs(2, 65, 2, 64, False)
    shifted = torch.empty(qkv.numel() + 1, dtype=qkv.dtype, device=DEVICE)[1:].view_as(qkv).copy_(qkv)
    assert shifted.data_ptr() % 16
    with bk.use_backend("triton"):
        torch.testing.assert_close(attention(shifted, 2), attention(qkv, 2), atol=1e-2, rtol=1e-2)


def test_other_heads_take_the_plain_path() -> None:
    qkv = torch.randn(2, 9, 3 * 40, device=DEVICE).bfloat16()
    with bk.use_backend("triton"):
        assert not supports(qkv, 1) and not supports(qkv.float(), 1)
        assert torch.equal(attention(qkv, 1), plain(*qkv.chunk(3, -1), 1, None, None))


def test_cross_attention() -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(2, 9, 64, device=DEVICE).bfloat16(), torch.randn(2, 5, 128, device=DEVICE).bfloat16()
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]], device=DEVICE)
    got = cross_attention(q, kv, 2, mask)
    assert _relative(got, plain(q.double(), *kv.double().chunk(2, -1), 2, mask, None)) < 1e-2
    assert torch.allclose(got[1].float(), kv[1, 1, 64:].float().expand(9, -1))  # the only key there is


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qkv": torch.zeros(2, 5, 100)}, ValueError, "qkv: .*multiple of num_heads"),
        ({"qkv": torch.zeros(2, 96, 5).mT}, ValueError, "qkv: .*contiguous"),
        ({"qkv": torch.zeros(2, 5, 96, dtype=torch.int32)}, TypeError, "qkv: "),
        ({"num_heads": 0}, ValueError, "num_heads: "),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask: "),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask: "),
        ({"out_scale": torch.ones(2)}, ValueError, "out_scale: "),
        ({"out_scale": torch.ones(1, dtype=torch.float64)}, TypeError, "out_scale: "),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attention(**{"qkv": torch.zeros(2, 5, 96), "num_heads": 1, **change})  # type: ignore[arg-type]
    if "kv" in str(change):
        with pytest.raises(ValueError, match="kv: "):
            cross_attention(torch.zeros(2, 5, 32), torch.zeros(2, 5, 32), 1)


def test_graph_and_dependent_launch() -> None:
    if not HAS_GPU:
        pytest.skip("no GPU on this machine")
    qkv, _ = _inputs(8, 257, 12, 64, False)
    expected, weight = attention(qkv, 12), torch.eye(768, 3 * 768, device=DEVICE, dtype=torch.bfloat16)
    chained = attention(expected @ weight, 12)
    graph = torch.cuda.CUDAGraph()
    attention(qkv, 12, pdl=True)
    with torch.cuda.graph(graph):
        got = attention(qkv, 12, pdl=True)
        last = attention(got @ weight, 12, pdl=True)
    for _ in range(3):
        got.zero_(), last.zero_()
        graph.replay()
        assert torch.equal(got, expected) and torch.equal(last, chained)
