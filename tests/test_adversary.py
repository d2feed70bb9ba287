"""The autoencoder's further terms: perceptual distance, discriminator, adaptive weight."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bldm.training import loop
from bldm.training.adversary import Adversary, PatchDiscriminator, adaptive_weight, hinge_loss
from bldm.training.autoencoder import lpips, train_autoencoder
from bldm.training.loop import accelerator
from test_training import CONFIG, equal, options, pictures
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


class Edges(nn.Module):
    """A stand-in for LPIPS: distance of the features of one fixed convolution."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.features = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1] == y.shape[1] == 3 and not self.features.weight.requires_grad
        return (self.features(x) - self.features(y)).square().mean((1, 2, 3))


def run(out: Path, **changes: Any) -> nn.Module:
    training = options(**changes)
    terms: dict[str, Any] = {"perceptual": Edges(), "perceptual_weight": 0.5, "gan_weight": 0.8, "gan_start": 8}
    return train_autoencoder(CONFIG, pictures(), training, out, flip=True, entropy_weight=0.1, **terms)


def test_hinge_loss() -> None:
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == pytest.approx((0.5 + 1.0) / 2)


def test_adaptive_weight_is_the_ratio_of_the_gradients() -> None:
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = last.square().sum() / 2, 0.1 * last.sum()
    expected = 5.0 / (0.1 * 2**0.5 + 1e-4)
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert weight.item() == pytest.approx(expected, rel=1e-6) and not weight.requires_grad
    assert adaptive_weight(1e9 * reconstruction, adversarial, last).item() == 1e4


@pytest.mark.parametrize(("size", "grid"), [(8, 2), (28, 5), (32, 6), (64, 6), (256, 30)])
def test_discriminator_judges_patches(size: int, grid: int) -> None:
    assert PatchDiscriminator(size, 1, width=4)(torch.zeros(2, 1, size, size)).shape == (2, 1, grid, grid)


def test_discriminator_is_the_same_whatever_the_batch() -> None:
    images = torch.randn(6, 3, 32, 32)
    model = PatchDiscriminator(32, 3, width=8)
    torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-4, atol=1e-6)
    assert not list(model.buffers())


def test_discriminator_learns_and_only_where_it_should() -> None:
    """The generator's term leaves no gradient in the discriminator, which learns to tell two kinds of images apart."""
    torch.manual_seed(0)
    adversary = Adversary(8, 1, options(lr=1e-2), accelerator(), start=0, weight=0.5)
    last = torch.ones((), requires_grad=True)
    losses = []
    for step in range(40):
        real, fake = torch.full((4, 1, 8, 8), 0.9), torch.full((4, 1, 8, 8), -0.9) * last
        terms = adversary.generator_loss(real, fake, last.square(), last, step)
        assert all(p.grad is None for p in adversary.learner.model.parameters())
        ratio = 2.0 / (torch.autograd.grad(terms["gan"] / (0.5 * terms["gan_weight"]), last)[0].abs() + 1e-4)
        assert terms["gan_weight"].item() == pytest.approx(min(ratio.item(), 1e4), rel=1e-3)
        losses.append(adversary.learn(step, 1e-2)["discriminator"].item())
    assert losses[0] == pytest.approx(1, abs=0.05) and losses[-1] < 0.1


def test_discriminator_starts_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    learn = Adversary.learn

    def watched(self: Adversary, step: int, lr: float) -> dict[str, Tensor]:
        losses = learn(self, step, lr)
        seen.append((step, "discriminator" in losses))
        return losses

    monkeypatch.setattr(Adversary, "learn", watched)
    run(tmp_path)
    assert seen == [(step, step >= 8) for step in range(20)]
    names = {"loss", "l1", "mse", "perceptual", "code_entropy", "gan", "gan_weight", "discriminator"}
    assert set(json.loads((tmp_path / "train.json").read_text())["final_losses"]) == names


def test_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    """Stopped by the clock at step 10, after the discriminator's start: its weights and optimiser come back too."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", max_minutes=1e-6)
    state = torch.load(tmp_path / "parts" / loop.CHECKPOINT)
    assert state["step"] == 10 and state["partner"]["averaged"] == 2
    assert equal(whole, run(tmp_path / "parts", resume=True))
    one, other = (torch.load(tmp_path / name / loop.CHECKPOINT)["partner"] for name in ("whole", "parts"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for a, b in zip(*(s["optimizer"]["state"].values() for s in (one, other)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_without_the_discriminator_is_named(tmp_path: Path) -> None:
    train_autoencoder(CONFIG, pictures(), options(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"resume: .*checkpoint.pt is not a checkpoint of this model: 'partner'"):
        run(tmp_path, resume=True)


def test_the_adversary_pulls_images_towards_the_real_ones(tmp_path: Path) -> None:
    """Under bfloat16: the terms stay finite and the autoencoder still learns."""
    settings: dict[str, Any] = {"steps": 150, "batch_size": 16, "lr": 1e-2, "warmup": 10, "mixed_precision": "bf16"}
    train_autoencoder(CONFIG, pictures(), options(**settings), tmp_path, gan_weight=0.2, gan_start=100)
    losses = json.loads((tmp_path / "train.json").read_text())["final_losses"]
    assert losses["l1"] < 0.3 and 0 < losses["discriminator"] < 1.5


def test_the_adversary_of_a_compiled_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    plain, compiled = (
        train_autoencoder(CONFIG, pictures(), options(steps=4, compile=compile), tmp_path / str(compile), gan_weight=0.5)
        for compile in (False, True)
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_code_entropy_rewards_using_every_bit(tmp_path: Path) -> None:
    entropies = []
    for weight in (0.0, 3.0):
        training = options(steps=60, batch_size=16, lr=5e-3)
        train_autoencoder(CONFIG, pictures(), training, tmp_path / str(weight), entropy_weight=weight)
        entropies.append(json.loads((tmp_path / str(weight) / "train.json").read_text())["final_losses"]["code_entropy"])
    assert entropies[1] > entropies[0]


@pytest.mark.parametrize(
    ("training", "terms", "message"),
    [
        ({}, {"gan_weight": -1.0}, "gan_weight: expected >= 0, got -1.0"),
        ({}, {"perceptual_weight": -0.5}, "perceptual_weight: expected >= 0, got -0.5"),
        ({}, {"gan_weight": 1.0, "gan_start": -1}, "gan_start: expected 0 <= gan_start"),
        ({"fsdp": True}, {"gan_weight": 1.0}, "fsdp: not together with gan_weight"),
    ],
)
def test_terms_are_checked(training: dict[str, Any], terms: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_autoencoder(CONFIG, pictures(), options(**training), tmp_path, **terms)


def test_lpips_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(RuntimeError, match=r"pip install 'bldm-kernels\[lpips\]'"):
        lpips()


def test_perceptual_sees_grey_images_as_colour(tmp_path: Path) -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(x[:, 0], x[:, 2]) and x.shape == y.shape == (4, 3, 8, 8)
        return F.l1_loss(x, y)

    train_autoencoder(CONFIG, pictures(), options(steps=1), tmp_path, perceptual=distance)
    losses = json.loads((tmp_path / "train.json").read_text())["final_losses"]
    assert losses["perceptual"] == losses["l1"]
