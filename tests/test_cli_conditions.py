"""`bldm sample` with texts, features of texts and parts of an image."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm import bundled, painter
from bldm.inpaint import inpainting_bits
from PIL import Image
from safetensors.torch import save_file
from test_cli import FEW, fail, invoke
from tiny_models import AUTOENCODER, DENOISER, _randomised, tiny_model
from torch import Tensor

import bldm_kernels as bk

WIDTH = 5


def text_model(cross_attention: bool = False, text_encoder: str | None = "all-MiniLM-L6-v2") -> bldm.BinaryLatentDiffusion:
    torch.manual_seed(0)
    denoiser = {**DENOISER, "text_width": WIDTH, "cross_attention": cross_attention}
    return _randomised(bldm.BinaryLatentDiffusion(AUTOENCODER, denoiser, num_steps=16, text_encoder=text_encoder))


class FirstLetter:
    """A text encoder of five channels: everything there is to say is the first letter."""

    def __init__(self, name: str, device: Any):
        assert name == "all-MiniLM-L6-v2"

    def encode(self, texts: Sequence[str], *, tokens: bool = False) -> Tensor:
        vectors = torch.stack([torch.arange(WIDTH) + float(ord(text[0])) for text in texts])
        return vectors.unsqueeze(1).repeat(1, 2, 1) if tokens else vectors


@pytest.fixture(autouse=True)
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(painter, "TextEncoder", FirstLetter)


def latents_of(*options: object) -> Tensor:
    invoke("sample", "--model", "model", *FEW, *options, "--latents", "latents")
    return bldm.PackedLatents.load("latents").packed


# --- texts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [False, True])
def test_texts_in_equal_shares(tokens: bool) -> None:
    model = text_model(tokens)
    model.save_pretrained("model")
    cond = model.encode_text(["a red apple"] * 3 + ["rose"] * 3)
    assert cond.shape == ((6, 2, WIDTH) if tokens else (6, WIDTH))
    expected = model.sampler().sample(6, 3, cond=cond, guidance_scale=3.0)
    assert torch.equal(latents_of("--text", "a red apple", "--text", "rose", "--guidance", 3), expected)
    with Image.open("samples.png") as picture:
        assert picture.size[1] == 2 * (84 + 6 + 16) + 6  # with captions


def test_a_text_alone_asks_the_bundled_emoji_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "files", lambda package: tmp_path)
    assert "the bundled model emoji is missing" in fail("sample", "--text", "rose", *FEW)
    text_model().save_pretrained(tmp_path / "pretrained" / "emoji")
    invoke("sample", "--text", "rose", *FEW, "--latents", "latents")
    own = text_model()
    expected = own.sampler().sample(6, 3, cond=own.encode_text(["rose"] * 6), guidance_scale=2.0)
    assert torch.equal(bldm.PackedLatents.load("latents").packed, expected)
    with pytest.raises(ValueError, match="name: expected one of 'fashion-mnist', 'emoji', got 'faces'"):
        bldm.bundled_model("faces")


def test_without_a_text_a_text_model_paints_anything() -> None:
    model = text_model()
    model.save_pretrained("model")
    assert torch.equal(latents_of(), model.sampler().sample(6, 3))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_features_from_a_file(tokens: bool, ending: str) -> None:
    model = text_model(tokens, text_encoder=None)
    model.save_pretrained("model")
    features = torch.randn(2, *((3,) if tokens else ()), WIDTH, generator=torch.Generator().manual_seed(1))
    if ending == "npy":
        np.save("features.npy", features.double().numpy())
    else:
        save_file({"features": features}, "features.safetensors")
    expected = model.sampler().sample(6, 3, cond=features.repeat_interleave(3, 0), guidance_scale=2.0)
    assert torch.equal(latents_of("--text-features", f"features.{ending}"), expected)


def test_wrong_conditions_are_one_line() -> None:
    text_model().save_pretrained("text")
    text_model(text_encoder=None).save_pretrained("converted")
    tiny_model().save_pretrained("classes")
    tiny_model(num_classes=None).save_pretrained("plain")
    np.save("wide.npy", np.zeros((2, 7), np.float32))
    np.save("whole.npy", np.zeros((2, WIDTH), np.int64))
    Path("broken.npy").write_bytes(b"no")
    save_file({"other": torch.zeros(2, WIDTH)}, "other.safetensors")
    cases = [
        ("classes", ("--text", "x"), "text: this model takes no text, but classes: see --label"),
        ("plain", ("--text-features", "wide.npy"), "text_features: this model takes no text, but no condition"),
        ("text", ("--label", "Bag"), "label: this model has no classes, but takes --text"),
        ("text", ("--text", "x", "--text-features", "wide.npy"), "label, text, text_features: expected one of them"),
        ("converted", ("--text", "x"), "text: this model does not say which text encoder .* give --text-features"),
        ("text", ("--text-features", "none.npy"), "text_features: no file none.npy"),
        ("text", ("--text-features", "wide.npy"), r"expected floating \(texts, 5\), got torch.float32 \(2, 7\)"),
        ("text", ("--text-features", "whole.npy"), r"expected floating \(texts, 5\), got torch.int64"),
        ("text", ("--text-features", "broken.npy"), "broken.npy is no .npy array"),
        ("text", ("--text-features", "other.safetensors"), "no safetensors file with 'features'"),
    ]
    for model, options, message in cases:
        line = fail("sample", "--model", model, *FEW, *options)
        assert re.search(message, line), (message, line)


def test_encode_text_of_models_without_an_encoder() -> None:
    with pytest.raises(ValueError, match="text: this model takes no text"):
        tiny_model().encode_text(["x"])
    with pytest.raises(ValueError, match="text: this model does not say which text encoder"):
        text_model(text_encoder=None).encode_text(["x"])


# --- inpainting -------------------------------------------------------------------------------------------------------
def test_bits_outside_the_mask_are_the_images() -> None:
    model = tiny_model()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[4:9, 27] = True  # rows 1 and 2 of the grid of 7, the last column
    keep_mask, keep_bits = inpainting_bits(model.autoencoder, images, mask)
    assert torch.equal(keep_bits, model.encode(images))
    repainted = bk.unpack_bits(keep_mask, 8) == 0
    expected = torch.zeros(2, 7, 7, 8, dtype=torch.bool)
    expected[:, 1:3, 6] = True
    assert torch.equal(repainted, expected)
    painted = model.sampler().sample(2, 4, keep_mask=keep_mask, keep_bits=keep_bits)
    changed = bk.unpack_bits(painted ^ keep_bits, 8) == 1
    assert not changed[~expected].any() and changed[expected].any()


def test_masks_are_checked() -> None:
    autoencoder, images = tiny_model().autoencoder, torch.zeros(2, 1, 28, 28)
    for mask in (torch.zeros(27, 28, dtype=torch.bool), torch.zeros(3, 28, 28, dtype=torch.bool)):
        with pytest.raises(ValueError, match="masks: expected shape"):
            inpainting_bits(autoencoder, images, mask)
    with pytest.raises(TypeError, match="masks: expected"):
        inpainting_bits(autoencoder, images, torch.zeros(28, 28))


def test_inpainting_from_the_command_line() -> None:
    model = tiny_model()
    model.save_pretrained("model")
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(grey).save("image.png")
    white = np.zeros((56, 56), np.uint8)  # of another size than the image
    white[:, :28] = 255
    Image.fromarray(white).save("mask.png")
    packed = latents_of("--inpaint", "image.png", "--mask", "mask.png", "--label", "Bag")
    known = model.encode(torch.from_numpy(grey)[None, None].float() / 127.5 - 1)
    changed = bk.unpack_bits(packed ^ known, 8) == 1
    assert not changed[:, :, 4:].any() and all(sample[:, :3].any() for sample in changed)


def test_wrong_inpainting_is_one_line() -> None:
    tiny_model().save_pretrained("model")
    Image.new("L", (28, 28)).save("black.png")
    both = "inpaint, mask: expected both or neither"
    assert both in fail("sample", "--model", "model", *FEW, "--inpaint", "black.png")
    assert both in fail("sample", "--model", "model", *FEW, "--mask", "black.png")
    nothing = fail("sample", "--model", "model", *FEW, "--inpaint", "black.png", "--mask", "black.png")
    assert "mask: black.png has no white pixel" in nothing
    Path("no.png").write_bytes(b"no")
    assert "no.png is not a readable picture" in fail(
        "sample", "--model", "model", *FEW, "--inpaint", "no.png", "--mask", "no.png"
    )
