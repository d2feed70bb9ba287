"""The inference engine of the autoencoder, and its kernels: against the float32 module, and against float64."""

from dataclasses import replace
from typing import Any

import bldm
import pytest
import torch
from bldm.engine.activations import largest_activation
from conftest import require_gpu
from paper_models import randomised
from targets import HAS_GPU
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference import group_norm, pixels
from bldm_kernels.inference.convolution import Filter, convolve
from bldm_kernels.inference.group_norm import PLAIN, SHIFTED, UPSAMPLED, Norm, finish

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = "cuda" if HAS_GPU else "cpu"
TAMING: dict[str, Any] = {"architecture": "taming", "in_channels": 3, "base_channels": 32, "channel_multipliers": (1, 2)}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"image_size": 12, "base_channels": 20, "channel_multipliers": (1, 3), "num_bits": 7, "num_res_blocks": 2},
    "plain with attention": {"image_size": 28, "base_channels": 8, "attention": True, "decoder_res_blocks": 2},
    "taming": {**TAMING, "image_size": 8, "num_bits": 12, "attention_levels": (1,), "norm_first": True, "signed": False},
    "taming, narrow codes": {
        **TAMING,
        "image_size": 16,
        "embedding_width": 32,
        "attention_levels": (0,),
        "channel_multipliers": (1, 1, 2),
    },
}


def model(name: str) -> bldm.BinaryAutoencoder:
    torch.manual_seed(0)
    return randomised(bldm.BinaryAutoencoder(**CONFIGURATIONS[name])).to(DEVICE)


def latents(model: bldm.BinaryAutoencoder, count: int) -> Tensor:
    height, width, num_bits = model.latent_shape
    return bk.random_bits(count, (height, width, num_bits), seed=3, device=DEVICE)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def counters(batch: int) -> Tensor:
    return torch.zeros(group_norm.counters_needed(batch), dtype=torch.int32, device=DEVICE)


# --- the rewritten convolutions ----------------------------------------------------------------------------------------
def test_upsampling_and_convolution_are_four_small_convolutions() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, padding=1).double()
    x = torch.randn(2, 7, 4, 5, dtype=torch.float64)
    filter = Filter.of(conv, torch.float64, upsampled=True)
    raw = convolve(x, filter)
    assert filter.weight.shape == (24, 5, 2, 2) and raw.shape == (2, 8, 5, 24)
    total, _ = finish(raw, filter.bias, source=filter.source)
    expected = conv(F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest"))
    assert total is not None
    torch.testing.assert_close(total.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-14)


def test_convolution_padded_behind_only() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, stride=2).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    filter = Filter.of(conv, torch.float64, padded_after=True)
    total, _ = finish(convolve(x, filter), filter.bias, source=filter.source)
    assert total is not None
    torch.testing.assert_close(total.permute(0, 3, 1, 2), conv(F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1))), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_refused(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="conv: expected a plain square convolution"):
        Filter.of(conv, torch.float32)
    with pytest.raises(ValueError, match="conv: expected a 3x3 convolution"):
        Filter.of(nn.Conv2d(4, 4, 1), torch.float32, upsampled=True)


# --- kernels against float64 ---------------------------------------------------------------------------------------------
SHAPES = [(3, 8, 8, 32, 8, PLAIN), (1, 8, 6, 96, 32, UPSAMPLED), (2, 7, 5, 40, 4, SHIFTED), (2, 20, 12, 32, 32, PLAIN)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "keep, apply, residual, silu", [(True, True, True, True), (False, True, False, False), (True, False, True, False)]
)
def test_finish(shape: tuple[int, ...], keep: bool, apply: bool, residual: bool, silu: bool) -> None:
    torch.manual_seed(1)
    batch, height, width, channels, groups, source = shape
    raws = {
        PLAIN: (batch, height, width, channels),
        UPSAMPLED: (batch, height // 2 + 1, width // 2 + 1, 4 * channels),
        SHIFTED: (batch, height + 1, width + 1, channels),
    }
    raw, bias = 3 * randn(*raws[source]).bfloat16() + 1, randn(channels)
    added = randn(batch, height, width, channels).bfloat16() if residual else None
    norm = Norm(groups, 1e-6, randn(channels), randn(channels), silu)
    used = counters(batch)
    with bk.use_backend("triton"):
        results = [finish(raw, bias, added, norm, source=source, keep=keep, apply=apply, counters=used) for _ in range(2)]
    assert not used.any()
    exact = replace(norm, weight=norm.weight.double(), bias=norm.bias.double())
    wide = None if added is None else added.double()
    total, normalized = finish(raw.double(), bias.double(), wide, exact, source=source, keep=keep, apply=apply)
    for kept, out in results:
        assert (kept is None) == (not keep) and out is not None and normalized is not None
        if kept is not None and total is not None:
            assert relative(kept, total) < 2e-3
        # Normalised from the sum as stored, if that is stored: rounded twice.
        assert relative(out, normalized) < (4e-3 if apply else 1e-6)
        assert torch.equal(out, results[0][1])  # type: ignore[arg-type]


def test_finish_with_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from bldm_kernels.inference.triton import group_norm as kernels

    monkeypatch.setattr(kernels, "MANY", 1)
    monkeypatch.setattr(kernels, "BLOCK", 512)
    test_finish((3, 10, 12, 32, 8, PLAIN), True, True, True, True)


def test_finish_without_a_norm_is_the_sum() -> None:
    torch.manual_seed(1)
    raw, bias = randn(2, 4, 4, 24).bfloat16(), randn(24)
    with bk.use_backend("triton"):
        total, nothing = finish(raw, bias)
    assert nothing is None and total is not None
    torch.testing.assert_close(total, (raw + bias).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("height, width, channels, columns", [(10, 12, 32, 3), (6, 5, 160, 7), (9, 8, 96, 1)])
@pytest.mark.parametrize("silu", [True, False])
def test_pixels(height: int, width: int, channels: int, columns: int, silu: bool) -> None:
    torch.manual_seed(1)
    x = randn(2, height, width, channels).bfloat16()
    norm = Norm(16, 1e-6, randn(channels), randn(channels), silu)
    exact = replace(norm, weight=norm.weight.double(), bias=norm.bias.double())
    statistics = group_norm.plain_statistics(x.float(), norm)
    weight, bias = (randn(columns, 3, 3, channels) * channels**-0.5 / 3).bfloat16(), randn(columns)
    expected = pixels.plain_pixels(x.double(), statistics.double(), exact, weight.double(), bias.double(), torch.float64)
    with bk.use_backend("triton"):
        images = pixels.pixels(x, statistics, norm, weight, bias)
        bytes = pixels.pixels(x, statistics, norm, weight, bias, torch.uint8)
    # The products of a GPU take normalised activations in bfloat16.
    assert relative(images, expected) < 4e-3 and images.is_contiguous() and images.dtype == torch.float32
    assert torch.equal(bytes, ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


@pytest.mark.parametrize("height, width, channels, total", [(5, 6, 3, 32), (4, 4, 1, 16)])
def test_patches(height: int, width: int, channels: int, total: int) -> None:
    torch.manual_seed(1)
    images = randn(2, channels, height, width)
    with bk.use_backend("triton"):
        values = pixels.patches(images, total, torch.bfloat16)
    # Triton's interpreter makes a number of the smallest of what is rounded to zero.
    torch.testing.assert_close(values, pixels.plain_patches(images, total, torch.bfloat16), rtol=0, atol=1e-37)
    conv = nn.Conv2d(channels, 6, 3, padding=1, bias=False, device=DEVICE).double()
    taps = F.pad(conv.weight.permute(0, 2, 3, 1).flatten(1), (0, total - 9 * channels))
    product = pixels.patches(images.double(), total, torch.float64) @ taps.T
    torch.testing.assert_close(product.permute(0, 3, 1, 2), conv(images.double()), rtol=0, atol=1e-12)


# --- the engine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, tolerance", [("bf16", 1.0), ("fp16", 0.15)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_engine_computes_what_the_module_does(name: str, backend: str, precision: str, tolerance: float) -> None:
    autoencoder = model(name)
    packed = latents(autoencoder, 2)
    images = autoencoder.decode(packed)
    with bk.use_backend(backend):
        engine = autoencoder.optimize(precision)
        decoded, pixel_values = engine.decode(packed), engine.decode(packed, dtype=torch.uint8)
        logits = engine.encode_logits(images)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    # A 255th of the range of an image, which is two wide.
    assert (decoded - images).abs().mean() < tolerance * 2 / 255
    assert pixel_values.dtype == torch.uint8
    assert (pixel_values.float() - (images.clamp(-1, 1) + 1) * 127.5).abs().mean() < max(tolerance, 0.4)
    expected = autoencoder.encode_logits(images)
    assert logits.shape == expected.shape and relative(logits, expected) < 2e-2 * tolerance


@torch.no_grad()
def test_batches_may_be_split() -> None:
    autoencoder = model("taming")
    packed = latents(autoencoder, 5)
    whole, split = autoencoder.optimize(), autoencoder.optimize(max_batch=2)
    images = whole.decode(packed)
    assert (split.decode(packed) - images).abs().mean() < 1 / 255  # other algorithms of the libraries, rounded otherwise
    assert torch.equal(whole.decode(packed), images)
    # Random bits of a sample depend on its index alone, so the same logits give the same bits.
    logits = split.encode_logits(images)
    assert torch.equal(split.encode(images, seed=5, sample_offset=7), bk.binarize(logits, seed=5, sample_offset=7, dim=1))
    assert torch.equal(split.encode(images), bk.binarize(logits, dim=1))
    assert split.decode(packed[:0]).shape == (0, 3, 8, 8) and split.encode(images[:0]).shape == (0, 4, 4, 2)


def test_the_engine_has_weights_of_its_own() -> None:
    autoencoder = model("plain")
    engine, packed = autoencoder.optimize(), latents(autoencoder, 1)
    before = engine.decode(packed)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
    assert torch.equal(engine.decode(packed), before)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_refresh_takes_weights_over_in_place(name: str) -> None:
    autoencoder, other = model(name), model(name)
    for parameter in other.parameters():
        parameter.mul_(-1.1).add_(0.01)
    engine, packed = autoencoder.optimize(), latents(autoencoder, 2)
    images = engine.decode(packed)
    logits = engine.encode_logits(images)
    addresses, graphs = [weight.data_ptr() for weight in engine._weights()], engine.num_graphs
    copies = [weight.clone() for weight in engine._weights()]
    engine.refresh(other)
    assert all(not torch.equal(weight, copy) for weight, copy in zip(engine._weights(), copies, strict=True))
    fresh = other.optimize(engine.precision)
    assert torch.equal(engine.decode(packed), fresh.decode(packed)) and not torch.equal(engine.decode(packed), images)
    assert torch.equal(engine.encode_logits(images), fresh.encode_logits(images))
    engine.refresh(autoencoder)
    assert torch.equal(engine.decode(packed), images) and torch.equal(engine.encode_logits(images), logits)
    assert [weight.data_ptr() for weight in engine._weights()] == addresses and engine.num_graphs == graphs


def test_refresh_refuses_what_does_not_fit_and_changes_nothing() -> None:
    autoencoder = model("plain")
    engine, packed = autoencoder.optimize("fp16"), latents(autoencoder, 1)
    images = engine.decode(packed)
    unsigned = bldm.BinaryAutoencoder(**{**CONFIGURATIONS["plain"], "signed": False}).to(DEVICE)
    for wrong in (model("plain with attention"), unsigned):
        with pytest.raises(ValueError, match="autoencoder: expected the configuration"):
            engine.refresh(wrong)
    with torch.no_grad():
        autoencoder.embedding.mul_(1e6)
    with pytest.raises(FloatingPointError, match="use 'bf16'"):
        engine.refresh(autoencoder)
    assert torch.equal(engine.decode(packed), images)


def test_report_names_every_part_and_what_runs_it() -> None:
    autoencoder = model("taming")
    with bk.use_backend("torch"):
        parts = autoencoder.optimize().report()
    with bk.use_backend("triton"):
        fast = autoencoder.optimize().report()
    assert [part.name for part in fast] == [part.name for part in parts]
    fused = [("sum" in part.name or "pixels" in part.name or "patches" in part.name) for part in fast]
    libraries = {"conv2d", "linear", "scaled_dot_product_attention"}
    assert all(part.runs == "kernel" if ours else part.runs in libraries for part, ours in zip(fast, fused, strict=True))
    assert all(part.runs == "PyTorch" if ours else part.runs in libraries for part, ours in zip(parts, fused, strict=True))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in autoencoder.modules())
    named = sum("convolution" in part.name or part.name.endswith(("/qkv", "/out", "/skip")) for part in fast)
    assert named == convolutions
    assert fast[0].name.startswith("decoder") and fast[0].shape == (4, 4, 64)


def test_activations_too_large_for_fp16_are_refused() -> None:
    autoencoder = model("plain")
    with torch.no_grad():
        autoencoder.embedding.mul_(1e6)
    with pytest.raises(FloatingPointError, match="use 'bf16'"):
        autoencoder.optimize("fp16")
    assert autoencoder.optimize("bf16").decode(latents(autoencoder, 1)).isfinite().all()


def test_fp16_is_taken_where_there_is_room() -> None:
    autoencoder = model("taming")
    engine = autoencoder.optimize()
    assert engine.precision == "fp16" and 0 < largest_activation(autoencoder) < 1000
    packed = latents(autoencoder, 1)
    assert torch.equal(engine.decode(packed), autoencoder.optimize("fp16").decode(packed))
    with torch.no_grad():
        autoencoder.embedding.mul_(1e5)  # finite in float16, but with little room
    assert largest_activation(autoencoder) > 5000 and autoencoder.optimize().precision == "bf16"
    with torch.no_grad():
        autoencoder.embedding.fill_(torch.nan)
    assert autoencoder.optimize().precision == "bf16"


def test_wrong_arguments_are_named() -> None:
    autoencoder = model("taming")
    with pytest.raises(ValueError, match="precision"):
        autoencoder.optimize("fp4")
    with pytest.raises(ValueError, match="max_batch"):
        autoencoder.optimize(max_batch=0)
    engine = autoencoder.optimize()
    packed = latents(autoencoder, 1)
    for wrong, error, name in [
        (lambda: engine.decode(packed[:, :1]), ValueError, "latents"),
        (lambda: engine.decode(packed.float()), TypeError, "latents"),
        (lambda: engine.decode(packed, dtype=torch.int64), TypeError, "dtype"),
        (lambda: engine.encode(torch.zeros(1, 3, 9, 8, device=DEVICE)), ValueError, "images"),
        (lambda: engine.encode(packed), TypeError, "images"),
    ]:
        with pytest.raises(error, match=name):
            wrong()


def test_wrong_arguments_of_the_kernels_are_named() -> None:
    raw, bias = randn(1, 4, 4, 16).bfloat16(), randn(16)
    norm = Norm(8, 1e-6, bias, bias, True)
    for wrong, name in [
        (lambda: finish(raw.permute(0, 2, 1, 3), bias), "raw"),
        (lambda: finish(raw, bias[:8]), "bias"),
        (lambda: finish(raw, bias, raw[:, :2].contiguous()), "residual"),
        (lambda: finish(raw, bias, norm=replace(norm, groups=3)), "norm.groups"),
        (lambda: finish(raw, bias, source=7), "source"),
        (lambda: finish(raw, bias, keep=False), "keep"),
        (lambda: pixels.patches(randn(1, 3, 4, 4), 26, torch.bfloat16), "width"),
        (lambda: convolve(raw, Filter(randn(4, 8, 1, 1).bfloat16(), bias[:4], 1, 0)), "x"),
    ]:
        with pytest.raises(ValueError, match=name):
            wrong()
    with bk.use_backend("triton"), pytest.raises(ValueError, match="counters"):
        finish(raw, bias, norm=norm)


@torch.no_grad()
def test_graphs_are_kept_and_replaced() -> None:
    require_gpu()
    autoencoder = model("taming")
    engine, direct = autoencoder.optimize(max_graphs=2), autoencoder.optimize(max_graphs=0)
    for count in (1, 3, 2, 3, 1):
        packed = latents(autoencoder, count)
        images = engine.decode(packed)
        assert (images - direct.decode(packed)).abs().mean() < 1 / 255
        assert torch.equal(engine.decode(packed), images)
        assert engine.num_graphs <= 2
    first = engine.decode(packed)
    engine.decode(latents(autoencoder, 1))
    assert torch.equal(first, engine.decode(packed)), "a result is not overwritten by the next call"
