"""Conditions of a denoiser in training: captions as features, kept on disk, left out by chance; and the training with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bldm
import pytest
import torch
from bldm.data import ImageData
from bldm.training import conditions
from bldm.training.augment import augment
from bldm.training.autoencoder import train_autoencoder
from bldm.training.conditions import Captions, Labels, caption_features
from bldm.training.denoiser import encode_images, train_denoiser
from test_training import CONFIG, DENOISER, equal, options, pictures
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = [["bars across", "across"], ["bars down"], ["across", "lines", "bars"]]
CPU = torch.device("cpu")


class LetterCounts:
    """A text encoder of three channels: how many letters a, b and s; one token a word."""

    made = 0

    def __init__(self, name: str = "", device: object = "cpu"):
        LetterCounts.made += 1

    def encode(self, texts: Sequence[str], *, tokens: bool = False) -> Tensor:
        def count(word: str) -> Tensor:
            return torch.tensor([float(word.count(letter) + 1) for letter in "abs"])

        if not tokens:
            return torch.stack([count(text) for text in texts])
        return torch.nn.utils.rnn.pad_sequence([torch.stack([count(w) for w in t.split()]) for t in texts], batch_first=True)


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "TextEncoder", LetterCounts)
    LetterCounts.made = 0


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder(CONFIG, pictures(), options(steps=200, batch_size=16, lr=1e-2, warmup=10, save_every=200), out)
    return out


@pytest.mark.parametrize("tokens", [False, True])
def test_every_image_gets_its_own_captions_and_all_of_them(tokens: bool) -> None:
    features = caption_features(CAPTIONS, tokens=tokens)
    assert len(features.table()) == 5 and features.width == 3  # "across" is there once
    condition = Captions(features, 0.0, CPU)
    rows = torch.tensor([0, 1, 2]).repeat(200)
    torch.manual_seed(0)
    found = condition(rows)
    for i, texts in enumerate(CAPTIONS):
        own = LetterCounts().encode(texts, tokens=tokens)
        seen = {tuple(row[row.ne(0).any(-1)].flatten().tolist() if tokens else row.tolist()) for row in found[i::3]}
        assert seen == {tuple(row[row.ne(0).any(-1)].flatten().tolist() if tokens else row.tolist()) for row in own}


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_captions_left_out(share: float, tokens: bool) -> None:
    condition = Captions(caption_features(CAPTIONS, tokens=tokens), share, CPU)
    torch.manual_seed(1)
    found = condition(torch.zeros(4000, dtype=torch.int64))
    left_out = (found == 0).flatten(1).all(1).float().mean()
    assert abs(float(left_out) - share) <= 4 * (share * (1 - share) / 4000) ** 0.5


def test_labels_left_out() -> None:
    torch.manual_seed(0)
    found = Labels(torch.tensor([0, 1]), 2, 0.25)(torch.ones(4000, dtype=torch.int64))
    assert set(found.tolist()) == {1, 2} and abs(float((found == 2).float().mean()) - 0.25) < 0.03


@pytest.mark.parametrize("tokens", [False, True])
def test_features_are_kept_on_disk(tokens: bool, tmp_path: Path) -> None:
    cache = tmp_path / "features"
    made = caption_features(CAPTIONS, cache, tokens=tokens)
    read = caption_features(CAPTIONS, cache, tokens=tokens)
    assert LetterCounts.made == 1 and torch.equal(made.features, read.features) and made.features.dtype == torch.float16
    assert torch.equal(made.table(), read.table()) and torch.equal(made.index, read.index)
    some = caption_features(CAPTIONS[1:], cache, tokens=tokens)  # fewer, in another order
    assert LetterCounts.made == 1 and torch.equal(some.table(), caption_features(CAPTIONS[1:], tokens=tokens).table())
    more = caption_features([["another one"], *CAPTIONS], cache, tokens=tokens)
    assert torch.equal(more.table(), caption_features([["another one"], *CAPTIONS], tokens=tokens).table())
    before = LetterCounts.made
    caption_features([*CAPTIONS, ["another one"]], cache, tokens=tokens)
    assert LetterCounts.made == before
    caption_features(CAPTIONS, cache, tokens=tokens, encoder="another")
    assert LetterCounts.made == before + 1, "features of another encoder were taken for these"


def test_broken_caches_are_named(tmp_path: Path) -> None:
    cache = tmp_path / "features"
    caption_features(CAPTIONS, cache)
    with pytest.raises(ValueError, match="captions: .*features is truncated or no cache"):
        caption_features(CAPTIONS, cache, tokens=True)  # the file of the other kind
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(ValueError, match="captions: .*features is truncated or no cache"):
        caption_features(CAPTIONS, cache)


def test_an_image_without_captions() -> None:
    with pytest.raises(ValueError, match="captions: expected one an image at least, image 1 has none"):
        caption_features([["a"], []])


def run(out: Path, autoencoder: Path, **changes: Any) -> bldm.BinaryLatentDiffusion:
    """Two captions an image, one copy of each, some of the captions left out: everything that is random."""
    data = ImageData(pictures().images, captions=[["as bars", "sass"], ["bb b", "bbb"]] * 8)
    captions = caption_features(data.captions or [], tokens=True)
    return train_denoiser(autoencoder, DENOISER, data, options(**changes), out, num_steps=16, copies=1, captions=captions)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_denoiser_learns_from_captions(tokens: bool, autoencoder: Path, tmp_path: Path) -> None:
    """Two pictures, bars across and bars down: the text says which one is painted."""
    images = pictures().images[[0, 4] * 8]
    data = ImageData(images, captions=[["sass"], ["bbb"]] * 8)
    captions = caption_features(data.captions or [], tokens=tokens)
    settings, config = options(steps=300, lr=1e-2, batch_size=16), {**DENOISER, "dropout": 0.0}
    trained = train_denoiser(autoencoder, config, data, settings, tmp_path, num_steps=16, captions=captions)
    model = bldm.BinaryLatentDiffusion.from_pretrained(tmp_path)
    assert equal(model, trained) and model.text_encoder == "all-MiniLM-L6-v2"
    assert model.denoiser.text_width == 3 and model.denoiser.cross_attention is tokens
    features = LetterCounts().encode(["sass"] * 16 + ["bbb"] * 16, tokens=tokens)
    painted = model.sample(32, 8, labels=features, guidance_scale=1.5, seed=1)
    down, across = painted.diff(dim=2).abs().mean((1, 2, 3)), painted.diff(dim=3).abs().mean((1, 2, 3))
    assert float((down > across)[:16].float().mean()) > 0.9 and float((down > across)[16:].float().mean()) < 0.1


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(autoencoder: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", autoencoder)
    run(tmp_path / "parts", autoencoder, max_minutes=1e-9)
    assert equal(run(tmp_path / "parts", autoencoder, resume=True), whole)


def test_captions_of_other_images_are_refused(autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions: expected those of 16 images, got those of 3"):
        train_denoiser(autoencoder, DENOISER, pictures(), options(), tmp_path, captions=caption_features(CAPTIONS))


def test_a_model_without_text_names_no_encoder() -> None:
    with pytest.raises(ValueError, match="text_encoder: this denoiser takes no text, expected None, got 'x'"):
        bldm.BinaryLatentDiffusion(CONFIG, DENOISER, text_encoder="x")


# --- copies of images -------------------------------------------------------------------------------------------------
def test_augmented_images_are_near_the_originals() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    blob = 2 * torch.exp(-((x - 16) ** 2 + (y - 14) ** 2) / 40) - 1
    images = blob.expand(64, 3, 32, 32)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and bool((moved.abs() <= 1).all())
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    mass = (moved[:, 0] + 1) / (moved[:, 0] + 1).sum((1, 2), keepdim=True)
    shift = torch.stack([(mass * x).sum((1, 2)) - 16, (mass * y).sum((1, 2)) - 14])
    assert 0.5 < float(shift.abs().max()) < 2.5 and float(shift.mean().abs()) < 0.4
    assert torch.allclose(augment(torch.full((2, 1, 8, 8), 0.5)), torch.full((2, 1, 8, 8), 0.5), atol=1e-5)


def test_copies_come_after_the_images(autoencoder: Path) -> None:
    model = bldm.BinaryAutoencoder.from_pretrained(autoencoder)
    images = pictures(6).images
    latents = encode_images(model, images, flip=True, copies=2, seed=3)
    assert latents.shape[0] == 36 and torch.equal(latents[:12], encode_images(model, images, flip=True))
    assert torch.equal(latents, encode_images(model, images, flip=True, copies=2, seed=3, batch_size=6))
