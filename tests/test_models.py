"""BinaryAutoencoder and BinaryDenoiser: shapes, what the output depends on, equality of training and inference, errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.data import load_images, to_float
from tiny_models import tiny_autoencoder, tiny_denoiser
from torch import Tensor

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
AUTOENCODERS: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"image_size": 28, "num_bits": 13, "base_channels": 8}, (7, 7, 13)),
    ({"image_size": 12, "in_channels": 3, "num_bits": 8, "base_channels": 4, "channel_multipliers": (1, 3)}, (6, 6, 8)),
    ({"image_size": 8, "num_bits": 1, "base_channels": 36, "channel_multipliers": (4, 1), "attention": True}, (4, 4, 1)),
    ({"image_size": 8, "num_bits": 5, "base_channels": 32, "channel_multipliers": (1, 2), "decoder_res_blocks": 2}, (4, 4, 5)),
    (
        {"image_size": 12, "base_channels": 32, "architecture": "taming", "attention_levels": [1], "decoder_res_blocks": 2},
        (3, 3, 32),
    ),
    ({"image_size": 5, "num_bits": 24, "base_channels": 8, "channel_multipliers": (2,), "num_res_blocks": 2}, (5, 5, 24)),
]


PICTURES = Path(__file__).parent / "data" / "fashion_mnist_64.npz"  # the first 64 of Fashion-MNIST's test set (MIT licence)


def images(model: bldm.BinaryAutoencoder, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, model.in_channels, model.image_size, model.image_size, generator=generator) * 2 - 1


@pytest.mark.parametrize(("config", "latent_shape"), AUTOENCODERS)
def test_autoencoder_shapes(config: dict[str, Any], latent_shape: tuple[int, int, int]) -> None:
    model = bldm.BinaryAutoencoder(**config).eval()
    x = images(model)
    h, w, c = latent_shape
    assert model.latent_shape == latent_shape
    assert model.encode_logits(x).shape == (3, c, h, w)
    latents = model.encode(x)
    assert latents.shape == (3, h, w, (c + 7) // 8) and latents.dtype == torch.uint8 and not latents.requires_grad
    assert model.decode(latents).shape == x.shape
    decoded, logits = model(x, seed=3, step=1)
    assert decoded.shape == x.shape and logits.shape == (3, c, h, w)


@torch.no_grad()
def test_training_and_inference_see_the_same_bits() -> None:
    model = tiny_autoencoder()
    x = images(model)
    for seed in (None, 5):
        model.mode = "threshold" if seed is None else "bernoulli"
        decoded, logits = model(x, seed=5)
        latents = model.encode(x, seed=seed)
        assert torch.equal(latents, bk.binarize(logits, seed=seed, dim=1))
        torch.testing.assert_close(decoded, model.decode(latents))
    signs = 2 * bk.unpack_bits(latents, model.latent_shape[-1]) - 1
    torch.testing.assert_close(model.decoder((signs @ model.embedding).movedim(-1, 1)), model.decode(latents))


def test_bernoulli_bits_of_an_image_do_not_depend_on_its_batch() -> None:
    model = tiny_autoencoder()
    x = images(model, 5)
    whole = model.encode(x, seed=9)
    parts = [model.encode(x[i : i + 1], seed=9, sample_offset=i) for i in range(5)]
    logits = model.encode_logits(x).detach()
    alone = torch.cat([model.encode_logits(x[i : i + 1]) for i in range(5)]).detach()
    torch.testing.assert_close(alone, logits)
    assert bk.hamming_distance(whole, torch.cat(parts)).sum() <= 1  # convolutions may round differently in another batch
    assert not torch.equal(whole, model.encode(x, seed=10))


@pytest.mark.parametrize("mode", ["bernoulli", "threshold"])
def test_gradient_passes_through_the_bits(mode: str) -> None:
    model = tiny_autoencoder().train()
    model.mode = mode
    decoded, _ = model(images(model))
    decoded.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("mode", ["bernoulli", "threshold"])
def test_autoencoder_overfits_real_pictures(mode: str) -> None:
    torch.manual_seed(0)
    model = bldm.BinaryAutoencoder(image_size=28, num_bits=24, base_channels=8, channel_multipliers=(1, 1), mode=mode)
    x = to_float(load_images(PICTURES, image_size=28).images[:8])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 80)
        loss = (model(x, seed=0, step=step)[0] - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (model.decode(model.encode(x)) - x).abs().mean()
    assert error < 0.65 * (x - x.mean(0)).abs().mean()  # the mean picture needs no bits


@torch.no_grad()
def test_denoiser_output_depends_on_every_input() -> None:
    model = tiny_denoiser()
    x = bk.random_bits(2, (4, 8), seed=0)
    t, label = torch.tensor([3, 9]), torch.tensor([0, 2])
    logits = model(x, t, label)
    assert logits.shape == (2, 4, 8) and logits.dtype == torch.float32
    assert not torch.allclose(logits, model(x, t + 1, label))
    assert not torch.allclose(logits, model(x, t, 2 - label))
    for bit in range(32):
        flipped = x.clone()
        flipped[0, bit // 8] ^= 1 << bit % 8
        other = model(flipped, t, label)
        assert not torch.allclose(other[0], logits[0])
        torch.testing.assert_close(other[1], logits[1])


@torch.no_grad()
def test_denoiser_keeps_the_shape_of_the_latent() -> None:
    model = tiny_denoiser()
    x = bk.random_bits(3, (2, 2, 8), seed=0)
    t = torch.tensor([1, 8, 16])
    assert torch.equal(model(x, t), model(x.flatten(1, 2), t).view(3, 2, 2, 8))
    assert model(x[:0], t[:0]).shape == (0, 2, 2, 8)


@torch.no_grad()
def test_no_label_is_the_null_label() -> None:
    model = tiny_denoiser()
    x = bk.random_bits(2, (4, 8), seed=0)
    t = torch.tensor([3, 9])
    assert model.null_label == 3
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
    assert bldm.BinaryDenoiser(4, 8, width=8, num_heads=2).null_label is None


@torch.no_grad()
def test_time_is_a_share_of_the_schedule() -> None:
    """Twice the steps, twice the timestep: the same time."""
    model = tiny_denoiser()
    finer = bldm.BinaryDenoiser(4, 8, width=16, depth=1, num_heads=2, num_classes=3, num_steps=32).eval()
    finer.load_state_dict(model.state_dict())
    x, t = bk.random_bits(2, (4, 8), seed=0), torch.tensor([3, 9])
    torch.testing.assert_close(model(x, t), finer(x, 2 * t))


def test_a_new_denoiser_knows_nothing_but_where_it_is() -> None:
    model = bldm.BinaryDenoiser(49, 16, width=32, depth=1, num_heads=2)
    assert not model(bk.random_bits(2, (49, 16), seed=0), torch.tensor([1, 2])).any()  # every flip as likely as not
    distances = torch.cdist(model.positions, model.positions) + 1e9 * torch.eye(49)
    assert distances.min() > 0.1
    nearest = distances[24].topk(4, largest=False).indices.tolist()
    assert sorted(nearest) == [17, 23, 25, 31]  # above, left, right, below
    assert bldm.BinaryDenoiser(5, 3, width=8, num_heads=2).positions.shape == (5, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_models_run_in_other_precisions(dtype: torch.dtype) -> None:
    denoiser, autoencoder = tiny_denoiser(), tiny_autoencoder()
    x, t = bk.random_bits(2, (4, 8), seed=0), torch.tensor([3, 9])
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    exact, decoded = denoiser(x, t), autoencoder.decode(bk.random_bits(2, (7, 7, 8), seed=0))
    logits = denoiser.to(dtype)(x, t)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact, rtol=tolerance, atol=tolerance)
    lower = autoencoder.to(dtype).decode(bk.random_bits(2, (7, 7, 8), seed=0))
    torch.testing.assert_close(lower.float(), decoded, rtol=tolerance, atol=tolerance)


def test_models_compile_without_a_graph_break() -> None:
    denoiser, autoencoder = tiny_denoiser(), tiny_autoencoder().train()
    x, t, label = bk.random_bits(5, (2, 2, 8), seed=0), torch.arange(1, 6), torch.arange(5) % 4
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, label), denoiser(x, t, label))
    any_batch = torch.compile(denoiser, fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 5):
        torch.testing.assert_close(any_batch(x[:n], t[:n]), denoiser(x[:n], t[:n]))
    pictures = images(autoencoder)
    compiled = torch.compile(autoencoder, fullgraph=True, backend="aot_eager")
    for step in (0, 5, 6):  # the step turns into a symbol
        for ours, plain in zip(compiled(pictures, seed=3, step=step), autoencoder(pictures, seed=3, step=step), strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_denoiser])
def test_checkpoints_hold_the_whole_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training


X, T = bk.random_bits(2, (4, 8), seed=0), torch.tensor([1, 2])
TEXT = bldm.BinaryDenoiser(4, 8, width=8, depth=1, num_heads=2, text_width=5)
CROSS = bldm.BinaryDenoiser(4, 8, width=8, depth=1, num_heads=2, text_width=5, cross_attention=True)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: bldm.BinaryAutoencoder(image_size=30), ValueError, "image_size: expected a multiple of 4 for 3 levels, got 30"),
    (lambda: bldm.BinaryAutoencoder(image_size=0), ValueError, "image_size: expected 1 <= image_size .*, got 0"),
    (lambda: bldm.BinaryAutoencoder(num_bits=0), ValueError, "num_bits: expected 1 <= num_bits .*, got 0"),
    (lambda: bldm.BinaryAutoencoder(in_channels=1.0), TypeError, "in_channels: expected an int, got float"),  # type: ignore[arg-type]
    (lambda: bldm.BinaryAutoencoder(base_channels=6), ValueError, "base_channels: expected a multiple of 4, got 6"),
    (lambda: bldm.BinaryAutoencoder(channel_multipliers=()), ValueError, r"channel_multipliers: expected .*, got \[\]"),
    (lambda: bldm.BinaryAutoencoder(channel_multipliers=(1, 0)), ValueError, r"channel_multipliers: expected .*, got \[1, 0\]"),
    (lambda: bldm.BinaryAutoencoder(num_res_blocks=0), ValueError, "num_res_blocks: expected 1 <= num_res_blocks"),
    (lambda: bldm.BinaryAutoencoder(mode="soft"), ValueError, "mode: expected one of 'bernoulli', 'threshold', got 'soft'"),
    (
        lambda: bldm.BinaryAutoencoder(architecture="unet"),
        ValueError,
        "architecture: expected one of 'plain', 'taming', got 'unet'",
    ),
    (lambda: bldm.BinaryAutoencoder(decoder_res_blocks=0), ValueError, "decoder_res_blocks: expected 1 <= decoder_res_blocks"),
    (lambda: bldm.BinaryAutoencoder(norm_first=True), ValueError, "norm_first: only architecture 'taming' takes it, got True"),
    (lambda: bldm.BinaryAutoencoder(attention_levels=[1]), ValueError, r"attention_levels: only .* 'taming' takes it, got \[1\]"),
    (
        lambda: bldm.BinaryAutoencoder(architecture="taming", attention_levels=[3]),
        ValueError,
        "attention_levels: expected 0 <= attention_levels <= 2, got 3",
    ),
    (
        lambda: bldm.BinaryAutoencoder(architecture="taming", base_channels=48),
        ValueError,
        "base_channels: expected a multiple of 32 for architecture 'taming', got 48",
    ),
    (
        lambda: bldm.BinaryAutoencoder(architecture="taming", embedding_width=33),
        ValueError,
        "embedding_width: expected a multiple of 32 for architecture 'taming', got 33",
    ),
    (lambda: tiny_autoencoder().encode(torch.zeros(2, 1, 32, 32)), ValueError, r"images: expected shape \(B, 1, 28, 28\), got"),
    (lambda: tiny_autoencoder().encode(torch.zeros(2, 1, 28, 28).byte()), TypeError, "images: expected dtype .*, got uint8"),
    (lambda: tiny_autoencoder()(torch.zeros(2, 1, 28, 24)), ValueError, r"images: expected .*, got \(2, 1, 28, 24\)"),
    (lambda: tiny_autoencoder().decode(torch.zeros(2, 7, 7, 8)), TypeError, "packed: expected dtype uint8, got float32"),
    (lambda: tiny_autoencoder().decode(bk.random_bits(2, (7, 8), seed=0)), ValueError, r"packed: expected shape \(2, 7, 7, 1\)"),
    (
        lambda: bldm.BinaryDenoiser(4, 8, width=18, num_heads=4),
        ValueError,
        "width: expected a multiple of 4 and of num_heads",
    ),
    (lambda: bldm.BinaryDenoiser(0, 8), ValueError, "num_positions: expected 1 <= num_positions .*, got 0"),
    (lambda: bldm.BinaryDenoiser(4, 8, depth=0), ValueError, "depth: expected 1 <= depth .*, got 0"),
    (lambda: bldm.BinaryDenoiser(4, 8, num_classes=0), ValueError, "num_classes: expected 1 <= num_classes .*, got 0"),
    (lambda: bldm.BinaryDenoiser(4, 8, dropout=1), ValueError, "dropout: expected 0 <= dropout < 1, got 1"),
    (lambda: bldm.BinaryDenoiser(4, 8, text_width=0), ValueError, "text_width: expected 1 <= text_width .*, got 0"),
    (lambda: bldm.BinaryDenoiser(4, 8, num_classes=2, text_width=3), ValueError, "num_classes, text_width: .*, got 2 and 3"),
    (lambda: bldm.BinaryDenoiser(4, 8, cross_attention=True), ValueError, "cross_attention: needs a text_width, got None"),
    (lambda: bldm.BinaryDenoiser(4, 8, time_embedding="t"), ValueError, "time_embedding: expected one of 'share', 'reference'"),
    (lambda: TEXT(X, T, T), TypeError, "label: expected dtype float32.*, got int64"),
    (lambda: TEXT(X, T, torch.zeros(2, 3)), ValueError, r"label: expected shape \(2, 5\) \(text features, one a sample\)"),
    (lambda: CROSS(X, T, torch.zeros(2, 5)), ValueError, r"label: expected shape \(2, 5, 5\) \(text features, one a sample\)"),
    (lambda: tiny_denoiser()(bk.random_bits(2, (5, 8), seed=0), T), ValueError, "x_t: expected 4 positions a sample, got shape"),
    (lambda: tiny_denoiser()(bk.random_bits(2, (1, 8), seed=0), T), ValueError, "x_t: expected 4 positions a sample, got shape"),
    (lambda: tiny_denoiser()(torch.zeros(2, 4, 1), T), TypeError, "x_t: expected dtype uint8, got float32"),
    (lambda: tiny_denoiser()(X, T[:1]), ValueError, r"t: expected shape \(2,\) \(one a sample\), got \(1,\)"),
    (lambda: tiny_denoiser()(X, T[0]), ValueError, r"t: expected shape \(2,\) \(one a sample\), got \(\)"),
    (lambda: tiny_denoiser()(X, T.float()), TypeError, "t: expected dtype int64, got float32"),
    (lambda: tiny_denoiser()(X, T, T[:1]), ValueError, r"label: expected shape \(2,\) \(one a sample\), got \(1,\)"),
    (lambda: tiny_denoiser()(X, T, T.float()), TypeError, "label: expected dtype int64, got float32"),
    (
        lambda: bldm.BinaryDenoiser(4, 8, width=8, num_heads=2)(bk.random_bits(2, (4, 8), seed=0), T, T),
        ValueError,
        "label: this model has no classes, expected None",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
