"""The attention kernel of warpgroups on the emulated machine of tests/emulator, where it runs without a GPU: its schedule, the
layouts that it reads and writes, and its arithmetic against float64."""

import ctypes

import pytest
import torch
from emulated import build
from torch import Tensor

from bldm_kernels.inference.attention import E4M3, plain


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build(tmp_path_factory.mktemp("emulator"), "attention.cpp")
    loaded.run_gradient.restype = ctypes.c_char_p
    return loaded


def run(
    library: ctypes.CDLL,
    qkv: Tensor,
    heads: int,
    scale: Tensor | None,
    blocks: int,
    split: bool,
    seed: int = 0,
    log_sums: Tensor | None = None,
) -> Tensor:
    samples, tokens, width = qkv.shape
    out = torch.full((samples, tokens, width // 3), float("nan")).to(torch.bfloat16 if scale is None else E4M3)
    pointers = [ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (qkv, out, scale, log_sums)]
    sizes = [ctypes.c_long(n) for n in (samples, tokens, heads, split)]
    assert library.run(ctypes.c_int(blocks), ctypes.c_uint(seed), *pointers, *sizes).decode() == ""
    return out


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# Samples, tokens, heads, blocks, whether a block takes half a head: stages that are used again, blocks of one unit and of
# several, as many as there are units and fewer.
@pytest.mark.parametrize(
    "samples, tokens, heads, blocks, split",
    [(2, 257, 3, 2, False), (1, 257, 2, 4, True), (1, 257, 2, 1, True), (1, 256, 2, 2, False), (1, 256, 1, 2, True)]
    + [(2, 258, 2, 1, False), (1, 264, 1, 1, False), (1, 265, 1, 2, True), (2, 272, 1, 1, False)],
)
def test_against_float64(emulated: ctypes.CDLL, samples: int, tokens: int, heads: int, blocks: int, split: bool) -> None:
    torch.manual_seed(tokens)
    qkv = (2 * torch.randn(samples, tokens, 3 * heads * 64)).bfloat16()
    expected = plain(*qkv.double().chunk(3, -1), heads, None, None)
    log_sums = torch.full((samples, heads, tokens), float("nan"))
    got = run(emulated, qkv, heads, None, blocks, split, log_sums=log_sums)
    assert error(got, expected) < 4e-3
    if tokens > 256:
        assert error(got[:, 256:], expected[:, 256:]) < 4e-3
    q, k = (x.double().unflatten(-1, (heads, 64)).transpose(1, 2) for x in qkv.chunk(3, -1)[:2])
    torch.testing.assert_close(log_sums.double(), (q @ k.mT / 8).logsumexp(-1), rtol=1e-4, atol=1e-4)
    scale = (expected.abs().max() / 400).float().reshape(1)
    assert error(run(emulated, qkv, heads, scale, blocks, split).double() * scale, expected) < 4e-2
    assert run(emulated, qkv, heads, scale / 1e4, blocks, split).float().abs().max() == 448


def test_any_order_of_events(emulated: ctypes.CDLL) -> None:
    qkv = torch.randn(2, 257, 3 * 2 * 64).bfloat16()
    runs = [run(emulated, qkv, 2, None, blocks, split, seed) for seed in (1, 2) for blocks, split in ((1, False), (3, True))]
    assert all(torch.equal(runs[0], other) for other in runs)


def test_scores_of_any_size(emulated: ctypes.CDLL) -> None:
    """One key far above the others takes all, wherever it is."""
    for key in (0, 100, 255, 256):
        qkv = torch.zeros(1, 257, 3 * 64).bfloat16()
        qkv[..., :64] = qkv[0, key, 64:128] = 100.0
        qkv[0, :, 128:] = (torch.arange(257) % 200)[:, None]
        assert run(emulated, qkv, 1, None, 1, False).eq(key % 200).all()


@pytest.mark.parametrize(
    "samples, tokens, heads, blocks, seed",
    [(1, 256, 2, 2, 0), (1, 257, 3, 1, 1), (2, 258, 2, 3, 2), (1, 260, 1, 1, 3), (1, 259, 4, 2, 4)],
)
def test_gradient_against_float64(emulated: ctypes.CDLL, samples: int, tokens: int, heads: int, blocks: int, seed: int) -> None:
    torch.manual_seed(tokens)
    check_gradient(emulated, (1.5 * torch.randn(samples, tokens, 3 * heads * 64)).bfloat16(), heads, blocks, seed)


def test_gradient_of_low_scores(emulated: ctypes.CDLL) -> None:
    """A key that is not there would have an infinite weight."""
    qkv = torch.randn(1, 257, 3 * 64)
    qkv[..., 0], qkv[..., 64] = 40, -40
    check_gradient(emulated, qkv.bfloat16(), 1, 1, 0, 3e-2)


def check_gradient(emulated: ctypes.CDLL, qkv: Tensor, heads: int, blocks: int, seed: int, limit: float = 1e-2) -> None:
    samples, tokens, _ = qkv.shape
    grad = torch.randn(samples, tokens, heads * 64).bfloat16()
    exact = qkv.double().requires_grad_()
    value = plain(*exact.chunk(3, -1), heads, None, None)
    (expected,) = torch.autograd.grad(value, exact, grad.double())
    q, k = (x.double().unflatten(-1, (heads, 64)).transpose(1, 2) for x in qkv.chunk(3, -1)[:2])
    out, log_sums = value.detach().bfloat16(), (q @ k.mT / 8).logsumexp(-1).float()
    result = torch.full(qkv.shape, float("nan"), dtype=torch.bfloat16)
    sums = torch.full((samples, 3 * heads * 64), float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (qkv, grad, out, log_sums, result, sums)]
    sizes = [ctypes.c_long(n) for n in (samples, tokens, heads)]
    assert emulated.run_gradient(ctypes.c_int(blocks), ctypes.c_uint(seed), *pointers, *sizes).decode() == ""
    for found, wanted in zip(result.chunk(3, -1), expected.chunk(3, -1), strict=True):
        assert error(found, wanted) < limit
        if tokens > 256:
            assert error(found[:, 256:], wanted[:, 256:]) < limit
    for part, wanted in zip(sums.chunk(3, -1), expected.chunk(3, -1), strict=True):
        assert float((part - wanted.sum(1)).norm() / wanted.norm()) < limit
