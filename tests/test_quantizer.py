"""BinaryQuantizer against LFQ, BSQ and BinaryMapper of vector_quantize_pytorch, and against plain Python integers."""

import re
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from conftest import require_package
from targets import HAS_GPU
from torch import Tensor

import bldm_kernels as bk

require_package("vector_quantize_pytorch")
from vector_quantize_pytorch import LFQ  # noqa: E402
from vector_quantize_pytorch.binary_mapper import BinaryMapper  # noqa: E402

ROOT = Path(__file__).parent.parent
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
SHAPES = {"sequence": (2, 7, "C"), "image": (2, "C", 3, 5), "video": (2, "C", 2, 3, 5)}


def inputs(shape: str, channels: int, seed: int = 0) -> Tensor:
    sizes = [channels if size == "C" else int(size) for size in SHAPES[shape]]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


# --- the same as other people's quantisers ----------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("num_bits", [1, 5, 8, 12])
def test_quantized_and_indices_are_lfqs(shape: str, spherical: bool, num_bits: int) -> None:
    theirs = LFQ(dim=num_bits, spherical=spherical, codebook_scale=0.5).eval()
    ours = bldm.BinaryQuantizer(num_bits, spherical=spherical, codebook_scale=0.5).eval()
    x = inputs(shape, num_bits)
    expected, got = theirs(x), ours(x)
    assert torch.equal(got.indices, expected.indices) and got.indices.dtype == torch.int64
    # LFQ's spherical codes are normalised numerically, ours are the constant
    torch.testing.assert_close(got.quantized, expected.quantized, rtol=2e-7 if spherical else 0, atol=0)
    assert got.aux_loss == expected.entropy_aux_loss == 0
    codes = ours.indices_to_codes(got.indices)
    assert torch.equal(codes, got.quantized)
    torch.testing.assert_close(codes, theirs.indices_to_codes(expected.indices), rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", ["sequence", "image"])
@pytest.mark.parametrize("spherical", [False, True])
def test_losses_and_gradients_are_lfqs(shape: str, spherical: bool) -> None:
    """With one group of all bits the batch entropy is LFQ's own, over all 2^C codes."""
    options = {"entropy_loss_weight": 0.3, "diversity_gamma": 0.7, "commitment_loss_weight": 0.25}
    theirs = LFQ(dim=5, spherical=spherical, **options).train()
    ours = bldm.BinaryQuantizer(5, spherical=spherical, entropy_group_bits=5, **options).train()
    weight, grads, results = inputs(shape, 5, seed=1), [], []
    for quantizer in (theirs, ours):
        x = inputs(shape, 5).requires_grad_()
        result, parts = quantizer(x, inv_temperature=0.5, return_loss_breakdown=True)
        ((result[0] * weight).sum() + 10 * result[2]).backward()
        results.append((*result, *parts))
        grads.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)  # LFQ clamps probabilities at 1e-5
    assert results[1][4].item() > 0.1  # the batch entropy, so that the comparison means something


def test_mask_and_projections_are_lfqs() -> None:
    theirs = LFQ(dim=12, codebook_size=2**5, commitment_loss_weight=1.0).train()
    ours = bldm.BinaryQuantizer(5, dim=12, entropy_group_bits=5, commitment_loss_weight=1.0).train()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name != "mask"})
    x, mask = inputs("sequence", 12), torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) > 0.5
    expected, got = (q(x, inv_temperature=0.5, mask=mask) for q in (theirs, ours))
    torch.testing.assert_close(tuple(got)[:2], tuple(expected)[:2], rtol=1e-5, atol=1e-6)
    # with a mask, LFQ (1.32) no longer averages over the positions before it takes the batch entropy: compare without
    chosen = theirs(x[mask][None], inv_temperature=0.5)
    torch.testing.assert_close(got.aux_loss, chosen.entropy_aux_loss, rtol=1e-5, atol=1e-6)
    assert abs(float((got.aux_loss - ours(x, inv_temperature=0.5).aux_loss).detach())) > 1e-3
    torch.testing.assert_close(ours.indices_to_codes(got.indices), theirs.indices_to_codes(expected.indices))
    assert ours.indices_to_codes(got.indices, project_out=False).shape == (2, 7, 5)
    images = inputs("image", 12)
    torch.testing.assert_close(ours.eval()(images).quantized, theirs.eval()(images).quantized)


@pytest.mark.parametrize("num_bits", [1, 7, 8, 11])
def test_indices_are_binary_mappers(num_bits: int) -> None:
    """The least significant bit first, from the same logits."""
    logits = inputs("sequence", num_bits)
    _, expected, _ = BinaryMapper(num_bits)(logits, deterministic=True, return_indices=True)
    ours = bldm.BinaryQuantizer(num_bits, mode="bernoulli", bit_order="little").eval()
    assert torch.equal(ours(logits).indices, expected)


# --- indices, codes and bytes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bit_order", ["big", "little"])
@pytest.mark.parametrize("num_bits", [1, 3, 8, 9, 16, 31, 32, 33, 56, 57, 62, 63])
def test_indices_are_the_bits_of_an_integer(num_bits: int, bit_order: str) -> None:
    quantizer = bldm.BinaryQuantizer(num_bits, bit_order=bit_order).eval()
    x = torch.cat([torch.ones(1, 1, num_bits), -torch.ones(1, 1, num_bits), torch.randn(1, 30, num_bits)], 1)
    indices = quantizer(x).indices
    for bits, index in zip((x > 0)[0].int().tolist(), indices[0].tolist(), strict=True):
        text = "".join(map(str, bits if bit_order == "big" else bits[::-1]))
        assert index == int(text, 2)
    codes = torch.where(x > 0, 1.0, -1.0)
    assert torch.equal(quantizer.indices_to_codes(indices), codes)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    packed = bk.pack_bits(x > 0)
    assert torch.equal(quantizer.indices_to_packed(indices), packed)
    assert torch.equal(quantizer.packed_to_indices(packed), indices)


@pytest.mark.parametrize("bit_order", ["big", "little"])
@pytest.mark.parametrize("num_bits", [64, 100, 256])
def test_many_bits_are_packed_bytes(num_bits: int, bit_order: str) -> None:
    quantizer = bldm.BinaryQuantizer(num_bits, bit_order=bit_order, spherical=True).train()
    x = inputs("image", num_bits).requires_grad_()
    result = quantizer(x)
    assert torch.equal(result.indices, bk.pack_bits(x.detach() > 0, 1)) and result.indices.shape == (2, 3, 5, (num_bits + 7) // 8)
    assert torch.equal(quantizer.indices_to_codes(result.indices), result.quantized)
    assert torch.equal(quantizer.codes_to_indices(result.quantized.detach()), result.indices)
    result.aux_loss.backward()
    assert bool(x.grad.isfinite().all()) and bool(x.grad.any())


@pytest.mark.parametrize("device", DEVICES)
def test_channel_first_may_be_said(device: str) -> None:
    x = inputs("sequence", 12).to(device)
    last = bldm.BinaryQuantizer(12).eval().to(device)
    first = bldm.BinaryQuantizer(12, channel_first=True).eval().to(device)
    expected, got = last(x), first(x.transpose(1, 2))
    assert torch.equal(got.indices, expected.indices) and torch.equal(got.quantized, expected.quantized.transpose(1, 2))
    assert torch.equal(first.indices_to_codes(got.indices), got.quantized)
    assert torch.equal(first.codes_to_indices(got.quantized), got.indices)


# --- losses -----------------------------------------------------------------------------------------------------------
def test_the_batch_entropy_of_smaller_groups_is_a_bound() -> None:
    x, entropies = inputs("sequence", 6), []
    for group in (1, 2, 4, 6, 16):  # 4 leaves a remainder
        quantizer = bldm.BinaryQuantizer(6, entropy_group_bits=group).train()
        entropies.append(float(quantizer(x, 0.5, return_loss_breakdown=True)[1].batch_entropy))
    assert entropies[0] > entropies[1] > entropies[3] and entropies[0] > entropies[2] > entropies[3]
    assert entropies[3] == entropies[4]
    average = torch.sigmoid(2.0 * x).reshape(-1, 6).mean(0).double()
    expected = torch.special.entr(average).sum() + torch.special.entr(1 - average).sum()
    assert entropies[0] == pytest.approx(float(expected), rel=1e-5)


def test_saturated_inputs_have_finite_gradients() -> None:
    quantizer = bldm.BinaryQuantizer(16, entropy_group_bits=8).train()
    x = (1000 * inputs("sequence", 16).sign()).requires_grad_()
    result = quantizer(x)
    result.aux_loss.backward()
    assert bool(result.aux_loss.isfinite()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = inputs("image", 12).to(dtype).requires_grad_()
    result = bldm.BinaryQuantizer(12).train()(x)
    assert result.quantized.dtype == dtype and result.aux_loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert set(result.quantized.unique().tolist()) == {-1.0, 1.0}  # exact, though the gradient passes through
    result.quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# --- Bernoulli bits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
def test_bernoulli_bits(device: str) -> None:
    quantizer = bldm.BinaryQuantizer(12, mode="bernoulli", codebook_scale=0.5).to(device)
    logits = inputs("image", 12).to(device).requires_grad_()
    result = quantizer.train()(logits, seed=7)
    packed = bk.binarize(logits.detach(), seed=7, dim=1)
    assert torch.equal(quantizer.indices_to_packed(result.indices), packed)
    assert torch.equal(result.quantized, bk.unpack_bits(packed, 12, dim=1) - 0.5)
    (grad,) = torch.autograd.grad(result.quantized.sum(), logits)
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(grad, p * (1 - p))
    assert torch.equal(quantizer.eval()(logits).indices, quantizer.codes_to_indices(logits))
    assert torch.equal(quantizer(logits, seed=torch.tensor([7], device=device)).indices, result.indices)


def test_bernoulli_bits_are_as_likely_as_said_and_torchs_seed_decides_them() -> None:
    quantizer, logits = bldm.BinaryQuantizer(8, mode="bernoulli").train(), torch.linspace(-3, 3, 8).expand(1, 20000, 8)
    torch.manual_seed(3)
    first, second = quantizer(logits), quantizer(logits)
    torch.manual_seed(3)
    assert torch.equal(quantizer(logits).indices, first.indices) and not torch.equal(first.indices, second.indices)
    p = torch.sigmoid(logits[0, 0])
    rate = (first.quantized > 0).float().mean((0, 1))
    assert bool(((rate - p).abs() < 5 * (p * (1 - p) / 20000).sqrt()).all())


# --- wrong arguments --------------------------------------------------------------------------------------------------
X = torch.zeros(2, 7, 12)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no bits": (lambda q: bldm.BinaryQuantizer(0), ValueError, "num_bits: expected 1 <= num_bits"),
    "mode": (lambda q: bldm.BinaryQuantizer(4, mode="sign"), ValueError, "mode: expected one of"),
    "order": (lambda q: bldm.BinaryQuantizer(4, bit_order="msb"), ValueError, "bit_order: expected one of 'big', 'little'"),
    "scale": (lambda q: bldm.BinaryQuantizer(4, codebook_scale=0), ValueError, "codebook_scale: expected > 0"),
    "group": (lambda q: bldm.BinaryQuantizer(4, entropy_group_bits=17), ValueError, "entropy_group_bits: expected 1 <="),
    "channels": (lambda q: q(X[..., :8]), ValueError, r"x: expected 12 channels at dimension 2, got shape \(2, 7, 8\)"),
    "image": (lambda q: q(X[:, :, None]), ValueError, "x: expected 12 channels at dimension 1"),
    "dtype": (lambda q: q(X.long()), TypeError, "x: expected dtype"),
    "seed": (lambda q: q(X, seed=1), ValueError, "seed: mode 'threshold' draws nothing"),
    "mask": (lambda q: q(X, mask=torch.ones(2, 6, dtype=torch.bool)), ValueError, r"mask: expected shape \(2, 7\)"),
    "mask dtype": (lambda q: q(X, mask=torch.ones(2, 7)), TypeError, "mask: expected dtype bool"),
    "temperature": (
        lambda q: bldm.BinaryQuantizer(12, mode="bernoulli")(X, 1.0),
        ValueError,
        "inv_temperature: mode 'bernoulli' has its own",
    ),
    "large": (lambda q: q.indices_to_codes(torch.tensor([4096])), ValueError, r"indices: expected within 0..2\^12 - 1"),
    "negative": (lambda q: q.indices_to_codes(torch.tensor([-1])), ValueError, r"indices: expected within 0..2\^12 - 1"),
    "float index": (lambda q: q.indices_to_codes(torch.tensor([1.0])), TypeError, "indices: expected dtype int64"),
    "bytes": (lambda q: q.packed_to_indices(torch.zeros(3, 1, dtype=torch.uint8)), ValueError, "packed: expected shape"),
}


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(bldm.BinaryQuantizer(12))


def test_the_documented_use_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quantizer.md").read_text(), re.DOTALL)
    exec(snippet, {})
    assert "torch.Size([8, 16, 16])" in capsys.readouterr().out
