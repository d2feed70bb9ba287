"""benchmarks/comparison: each method learns, paints, goes on where it stopped, and is as large as the others."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bldm.data import ImageData
from bldm.training.conditions import CaptionFeatures
from PIL import Image
from test_data import write_idx
from test_emoji_quality import write_data

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "comparison"))
import compare  # noqa: E402
import learn  # noqa: E402
import show  # noqa: E402
from diffusions import GaussianDiffusion, MaskedTokens, guided  # noqa: E402
from settings import METHODS, SETTINGS, Setting  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = replace(
    SETTINGS["fashion_mnist"],
    image_size=8,
    pad=0,
    convnet={"in_channels": 1, "base_channels": 8, "channel_multipliers": (1, 1)},
    transformer={"width": 16, "depth": 1, "num_heads": 2},
    bits=8,
    codebooks=2,
    codes=16,
    channels=2,
    autoencoder_batch=16,
    autoencoder_lr=5e-3,
    batch=32,
    lr=5e-3,
    guidance=(1.0, 2.0),
    steps=(2, 4),
    minutes=(1.0, 1.0),
)


def bars() -> ImageData:
    """Two classes: bars across and bars down."""
    rows = (torch.arange(8) + torch.arange(16)[:, None]) % 4 < 2
    across, down = rows[:, :, None].expand(-1, 8, 8), rows[:, None, :].expand(-1, 8, 8)
    label = torch.arange(16) // 4 % 2
    images = torch.where(label[:, None, None] == 0, across, down).to(torch.uint8) * 255
    return ImageData(images.unsqueeze(1).contiguous(), label, ["across", "down"])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def final_losses(out: Path) -> list[float]:
    return [json.loads((out / name / "train.json").read_text())["final_losses"]["loss"] for name in ("autoencoder", "model")]


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_both_losses_and_samples_are_images(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # whatever ran before
    learn.learn(method, TINY, bars(), None, tmp_path / "short", 1)
    model = learn.learn(method, TINY, bars(), None, tmp_path / "long", 150)
    for before, after in zip(final_losses(tmp_path / "short"), final_losses(tmp_path / "long"), strict=True):
        assert after < 0.9 * before
    labels = torch.arange(5) % 2
    painter = compare.Painter(model, torch.device("cpu"))
    images = painter.sample(labels, 3, 2.0, 2)
    assert images.shape == (5, 1, 8, 8) and images.isfinite().all()
    assert painter.reconstruct(images).shape == images.shape
    assert torch.equal(images, painter.sample(labels, 3, 2.0, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_model_is_loaded_and_spent_minutes_count(method: str, tmp_path: Path) -> None:
    model = learn.learn(method, TINY, bars(), None, tmp_path, 2)
    written = (tmp_path / "model" / "checkpoint.pt").stat().st_mtime_ns
    again = learn.learn(method, TINY, bars(), None, tmp_path, 50)
    assert (tmp_path / "model" / "checkpoint.pt").stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    (tmp_path / "model" / "config.json").unlink()  # as if it had been killed before the end
    state = torch.load(tmp_path / "model" / "checkpoint.pt")
    torch.save({**state, "minutes": 0.7}, tmp_path / "model" / "checkpoint.pt")
    learn.learn(method, TINY, bars(), None, tmp_path, 4)
    summary = json.loads((tmp_path / "model" / "train.json").read_text())
    assert summary["options"]["max_minutes"] == pytest.approx(0.3) and summary["steps_done"] == 4


@pytest.mark.parametrize("data_set", SETTINGS)
def test_methods_have_equally_many_parameters(data_set: str) -> None:
    setting = SETTINGS[data_set]
    known = {"num_classes": 10} if data_set == "fashion_mnist" else {"text_width": 384}
    models = [learn.CLASSES[m](setting.autoencoder(m), {**setting.transformer, **known}) for m in METHODS]
    for part in ("autoencoder", "denoiser"):
        counts = [compare.num_parameters(getattr(model, part)) for model in models]
        assert max(counts) < 1.05 * min(counts)
    assert setting.codebooks * math.log2(setting.codes) == pytest.approx(setting.bits, rel=0.02)
    assert len({model.latent_shape[:2] for model in models}) == 1


def test_every_token_is_unmasked_and_known_ones_stay() -> None:
    """A denoiser that says token 3 of every code: after any number of steps nothing else is there."""
    torch.manual_seed(0)
    model = MaskedTokens(TINY.autoencoder("tokens"), {**TINY.transformer, "num_classes": 2}).eval()
    seen = []

    def certain(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        seen.append((x.clone(), t))
        return torch.nn.functional.one_hot(torch.full_like(x, 3), 16) * 100.0

    model.denoiser.forward = certain  # type: ignore[method-assign]
    for steps in (1, 5, 100):
        seen.clear()
        tokens = model._draw(3, steps, None, 1.0, torch.Generator().manual_seed(0))
        assert tokens.shape == (3, 4, 4, 2) and tokens.eq(3).all()
        masked = [x.lt(0).flatten(1).sum(1) for x, _ in seen]
        assert masked[0].eq(32).all() and all((b <= a).all() for a, b in zip(masked, masked[1:], strict=False))
        assert all((later.ge(0) >= x.ge(0)).all() for (x, _), (later, _) in zip(seen, seen[1:], strict=False))


def test_ddim_finds_the_data_of_an_exact_denoiser() -> None:
    """All data is one point z: v = alpha noise - sigma z is known: every step keeps the noise, and the last ends in z."""
    model = GaussianDiffusion(TINY.autoencoder("gaussian"), {**TINY.transformer, "num_classes": 2}).eval()
    z = torch.tensor([0.5, -2.0])
    model.mean, model.deviation = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])

    noises: list[torch.Tensor] = []

    def exact(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        angle = (t * math.pi / 2 / 1024).view(-1, 1, 1, 1)
        noises.append((x - angle.cos() * z) / angle.sin())
        return angle.cos() * (x - angle.cos() * z) / angle.sin() - angle.sin() * z

    model.denoiser.forward = exact  # type: ignore[method-assign]
    for steps in (1, 7):
        noises.clear()
        drawn = model._draw(2, steps, None, 1.0, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn, (z * model.deviation + model.mean).expand_as(drawn), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(noises), noises[0].expand(steps, *drawn.shape), rtol=1e-3, atol=1e-3)


def test_guidance_moves_away_from_the_null_label() -> None:
    model = GaussianDiffusion(TINY.autoencoder("gaussian"), {**TINY.transformer, "num_classes": 2}).eval()
    torch.nn.init.normal_(model.denoiser.head.weight)
    x, label, t = torch.randn(3, 4, 4, 2), torch.tensor([0, 1, 0]), torch.full((3,), 9)
    with torch.no_grad():
        conditional, free = model.denoiser(x, t, label), model.denoiser(x, t, torch.full_like(label, 2))
        expected = free + 3 * (conditional - free)
        torch.testing.assert_close(guided(model.denoiser, x, 9, label, 3.0), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guided(model.denoiser, x, 9, label, 1.0), conditional, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, free)


def small(monkeypatch: pytest.MonkeyPatch, data_set: str, judge: Any, **changes: Any) -> Setting:
    """The data set's setting made tiny, and its judge trained for moments."""
    setting = replace(TINY, **changes)
    monkeypatch.setitem(SETTINGS, data_set, setting)
    known = compare.JUDGES[data_set]
    monkeypatch.setitem(compare.JUDGES, data_set, lambda *arguments: known(*arguments, judge))
    return setting


def compared(data_set: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / f"comparison_{data_set}.json"
    for method in METHODS:
        compare.main(data_set, method, data, tmp_path / "runs", "1,1", 2, 20, 5, "test", out)
    show.main([out], tmp_path / "images")
    assert Image.open(tmp_path / "images" / f"{out.stem}.png").size[0] > 400
    return json.loads(out.read_text())


def test_fashion_mnist_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    monkeypatch.setattr("test_data.IMAGES", images)
    labels = torch.arange(300).remainder(10).byte().numpy()
    for split in ("train", "t10k"):
        write_idx(tmp_path / "data", split, labels=labels)
    small(monkeypatch, "fashion_mnist", 1, image_size=12, pad=2, flip_latents=True)
    result = compared("fashion_mnist", tmp_path / "data", tmp_path)
    assert list(result["methods"]) == list(METHODS)
    for entry in result["methods"].values():
        assert [(r["guidance"], r["steps"]) for r in entry["samples"]] == [(g, s) for g in (1, 2) for s in (2, 4)]
        assert all(r["images_per_second"] > 0 and r["frechet"] > 0 for r in entry["samples"])
        assert entry["training_steps"] == [2, 2] and entry["latent_shape"][:2] == [6, 6]
    assert "| VQ tokens, masked prediction, guidance 2 |" in capsys.readouterr().out


def test_emoji_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data", monkeypatch)
    convnet = {"in_channels": 3, "base_channels": 8, "channel_multipliers": (1, 1, 1), "attention": True}
    small(monkeypatch, "emoji", 2, image_size=16, convnet=convnet, augmented=True, copies=1)
    result = compared("emoji", tmp_path / "data", tmp_path)
    for entry in result["methods"].values():
        assert {r["set"] for r in entry["samples"]} == {"trained", "held_out"} and len(entry["samples"]) == 8
        assert all(0 <= r["accuracy"] <= r["top5"] <= 1 for r in entry["samples"])


def test_features_of_captions_condition_the_opponents(tmp_path: Path) -> None:
    features = CaptionFeatures(torch.randn(4, 3).half(), None, torch.arange(16) % 4, torch.ones(16, dtype=torch.int64), None)
    model = learn.learn("gaussian", TINY, bars(), features, tmp_path, 2)
    assert model.denoiser.text_width == 3 and model.denoiser.null_label == 0
    assert model.sample(2, 2, labels=torch.randn(2, 3), guidance_scale=2.0).shape == (2, 1, 8, 8)
