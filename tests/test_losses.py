"""DiffusionLoss against the formulas written out, and what its optimum is."""

import math
from typing import Any

import bldm
import pytest
import torch
from bldm.losses import DiffusionLoss
from torch import Tensor
from torch.nn import functional as F

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BITS = 12, 13
SCHEDULE = bk.BernoulliSchedule("cosine", STEPS)
SHAPE = (7, BITS)


class Recorder:
    """A denoiser with fixed logits a bit, differentiable, that remembers what it was asked."""

    def __init__(self, logits: Tensor | float = 0.0):
        self.logits = logits
        self.x_t = self.t = self.label = torch.empty(0)

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.x_t, self.t = x_t, t
        self.label = torch.empty(0) if label is None else label
        return torch.as_tensor(self.logits).expand(len(x_t), *SHAPE)


def latents(count: int = 20) -> Tensor:
    return bk.random_bits(count, SHAPE, seed=4)


def run(denoiser: Any, count: int = 20, seed: int = 1, step: int = 2, **options: Any) -> dict[str, Tensor]:
    return DiffusionLoss(SCHEDULE, **options)(denoiser, latents(count), BITS, seed=seed, step=step)


def bits(packed: Tensor) -> Tensor:
    return bk.unpack_bits(packed, BITS, torch.float64)


def random_logits(count: int = 20) -> Tensor:
    return 3 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
@pytest.mark.parametrize("weighting", ["mean", "weighted"])
@pytest.mark.parametrize("form", ["plain", "balanced", "focal"])
def test_loss_is_the_formula(form: str, weighting: str, prediction: str) -> None:
    logits = random_logits()
    denoiser = Recorder(logits)
    losses = run(denoiser, form=form, weighting=weighting, prediction=prediction, focal_gamma=2.0)
    x_0, x_t = bits(latents()), bits(denoiser.x_t)
    target = (x_0 != x_t).double() if prediction == "flip" else x_0
    expected = F.binary_cross_entropy_with_logits(logits.double(), target, reduction="none")
    if form != "plain":
        r = target.mean((1, 2), keepdim=True)
        expected = expected * torch.where(target > 0, 1 - r, r)
    if form == "focal":
        p = torch.sigmoid(logits.double())
        expected = expected * torch.where(target > 0, 1 - p, p) ** 2
    if weighting == "weighted":
        expected = expected * (1 - (denoiser.t - 1) / STEPS).view(-1, 1, 1)
    torch.testing.assert_close(losses["loss"].double(), expected.mean(), rtol=1e-5, atol=1e-7)
    assert set(losses) == {"loss", "bce"} and torch.equal(losses["loss"], losses["bce"])


def test_both_predictions_are_one_loss() -> None:
    """A flip logit is an x_0 logit with its sign turned where the bit of x_t is 1."""
    logits, asked = random_logits(), Recorder()
    run(asked)
    turned = torch.where(bits(asked.x_t) > 0, -logits, logits)
    flip = run(Recorder(turned), posterior_kl=0.5)
    x_0 = run(Recorder(logits), posterior_kl=0.5, prediction="x_0")
    for name in flip:
        torch.testing.assert_close(flip[name], x_0[name])


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    draws = {}
    for seed, step in ((1, 2), (1, 3), (2, 2), (1, 2)):
        denoiser = Recorder()
        torch.manual_seed(len(draws))
        run(denoiser, seed=seed, step=step)
        again = draws.setdefault((seed, step), denoiser)
        assert torch.equal(again.t, denoiser.t) and torch.equal(again.x_t, denoiser.x_t)
    assert len({tuple(d.t.tolist()) for d in draws.values()}) == 3


def test_timesteps_are_uniform_and_the_noise_is_theirs() -> None:
    denoiser, count = Recorder(), 20_000
    run(denoiser, count)
    share = torch.bincount(denoiser.t, minlength=STEPS + 1) / count
    assert share[0] == 0 and len(share) == STEPS + 1
    assert (share[1:] - 1 / STEPS).abs().max() < 5 * math.sqrt(1 / STEPS / count)
    flips = (bits(latents(count)) != bits(denoiser.x_t)).double().mean((1, 2))
    for t in range(1, STEPS + 1):
        p, n = float(SCHEDULE.flip[t]), int((denoiser.t == t).sum()) * 7 * BITS
        assert abs(float(flips[denoiser.t == t].mean()) - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_labels_reach_the_denoiser() -> None:
    denoiser, label = Recorder(), torch.arange(20)
    DiffusionLoss(SCHEDULE)(denoiser, latents(), BITS, seed=0, step=0, label=label)
    assert torch.equal(denoiser.label, label)


def test_plain_loss_is_least_at_the_true_probability() -> None:
    """The flips of fair bits have probability (1 - k_t) / 2: there the gradient vanishes, and it does not if balanced."""
    schedule = bk.BernoulliSchedule.from_keep([1.0, 0.8])
    p = float(schedule.flip[1])
    slopes = {}
    for form in ("plain", "balanced"):
        logit = torch.tensor(math.log(p / (1 - p)), requires_grad=True)
        loss = DiffusionLoss(schedule, form=form)(Recorder(logit), latents(20_000), BITS, seed=0, step=0)["loss"]
        slopes[form] = float(torch.autograd.grad(loss, logit)[0])
    n = 20_000 * 7 * BITS
    assert abs(slopes["plain"]) < 5 * math.sqrt(p * (1 - p) / n)
    assert slopes["balanced"] < -0.05


def posterior(x_t: int, x_0: int, t: int) -> float:
    """q(x_{t-1} != x_t | x_t, x_0) by Bayes on the two-state chain."""
    k_t, k_s = float(SCHEDULE.keep[t]), float(SCHEDULE.keep[t - 1])
    step = (1 - k_t / k_s) / 2  # probability that x_{t-1} -> x_t flips

    def joint(x_s: int) -> float:
        from_start = (1 - k_s) / 2 if x_s != x_0 else (1 + k_s) / 2
        return from_start * (step if x_s != x_t else 1 - step)

    return joint(1 - x_t) / (joint(0) + joint(1))


def kl(q: float, p: float) -> float:
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)


def predicted(rule: str, f: float, x_t: int, t: int) -> float:
    """p(x_{t-1} != x_t | x_t) of a denoiser that says P(x_0 != x_t) = f; the last step takes its word."""
    if t == 1:
        return f
    if rule == "marginal":  # the mixture of the two exact posteriors
        return f * posterior(x_t, 1 - x_t, t) + (1 - f) * posterior(x_t, x_t, t)
    k_s, kappa = float(SCHEDULE.keep[t - 1]), float(SCHEDULE.keep[t] / SCHEDULE.keep[t - 1])
    other = f * (1 + k_s) / 2 + (1 - f) * (1 - k_s) / 2  # one posterior, of the mixed prior P(x_{t-1} != x_t)
    return other * (1 - kappa) / (other * (1 - kappa) + (1 - other) * (1 + kappa))


@pytest.mark.parametrize("rule", ["plugin", "marginal"])
@pytest.mark.parametrize("logit", [-2.0, 0.3, 4.0])
def test_posterior_kl_is_bayes(logit: float, rule: str) -> None:
    denoiser = Recorder(logit)
    losses = run(denoiser, posterior_kl=1.0, rule=rule)
    f = 1 / (1 + math.exp(-logit))
    total = 0.0
    x_0, x_t = bits(latents()).int(), bits(denoiser.x_t).int()
    for i, t in enumerate(denoiser.t.tolist()):
        for a, b in zip(x_t[i].flatten().tolist(), x_0[i].flatten().tolist(), strict=True):
            total += kl(posterior(a, b, t), predicted(rule, f, a, t))
    expected = total / x_0.numel()
    assert abs(float(losses["posterior_kl"]) - expected) < 1e-4 * expected + 1e-6
    torch.testing.assert_close(losses["loss"], losses["bce"] + losses["posterior_kl"])


@pytest.mark.parametrize("rule", ["plugin", "marginal"])
def test_posterior_kl_vanishes_for_a_denoiser_that_knows(rule: str) -> None:
    asked, count = Recorder(), 200
    run(asked, count)
    assert bool((asked.t == 1).any())  # there the true posterior is certain: no 0 / 0
    certain = torch.where(bits(asked.x_t) != bits(latents(count)), 30.0, -30.0).float().requires_grad_()
    losses = run(Recorder(certain), count, posterior_kl=1.0, rule=rule)
    assert abs(float(losses["posterior_kl"])) < 1e-5
    unsure = torch.zeros(count, *SHAPE, requires_grad=True)
    doubtful = run(Recorder(unsure), count, posterior_kl=1.0, rule=rule)
    assert float(doubtful["posterior_kl"]) > 1e-3
    gradient = torch.autograd.grad(doubtful["loss"] - doubtful["bce"] + 0 * unsure.sum(), unsure)[0]
    assert bool((gradient * certain.sign() <= 0).all()) and bool(gradient.any())  # downhill is towards the truth


GRID, FEW_STEPS = (4, 8), bk.BernoulliSchedule("linear", 16)


def two_latents(count: int) -> Tensor:
    """All zeros or, three times as often, all ones."""
    return torch.where(torch.rand(count, 1, 1) < 0.75, 255, 0).expand(-1, 4, 1).to(torch.uint8).contiguous()


def knows_the_two(x_t: Tensor, t: Tensor) -> Tensor:
    """Logits of x_0 by Bayes, given how many bits of x_t are set: what training on `two_latents` strives for."""
    evidence = torch.log((1 + FEW_STEPS.keep[t]) / (1 - FEW_STEPS.keep[t]))
    surplus = 2 * bk.unpack_bits(x_t, 8, torch.float64).sum((1, 2)) - 32
    return (math.log(3) + surplus * evidence).view(-1, 1, 1).expand(-1, *GRID).float().contiguous()


def share_of_ones(denoiser: Any, prediction: str, rule: str = "plugin") -> float:
    sampler = bldm.FastSampler(denoiser, FEW_STEPS, latent_shape=GRID, prediction=prediction, rule=rule)
    ones = bk.unpack_bits(sampler.sample(2000, 16, seed=1), 8).mean((1, 2))
    assert ((ones == 0) | (ones == 1)).float().mean() > 0.98
    return float(ones.round().mean())


@pytest.mark.parametrize("rule", ["plugin", "marginal"])
def test_the_true_posterior_samples_the_distribution(rule: str) -> None:
    """To the error of 16 steps that draw the bits one by one: 0.775 and 0.78 of 20,000."""
    assert abs(share_of_ones(knows_the_two, "x_0", rule) - 0.75) < 0.06


@pytest.mark.parametrize("prediction", ["flip", "x_0"])
def test_a_learnt_distribution_is_sampled(prediction: str) -> None:
    torch.manual_seed(0)
    denoiser = bldm.BinaryDenoiser(*GRID, width=32, depth=1, num_heads=2, num_steps=16)
    criterion = DiffusionLoss(FEW_STEPS, prediction)
    optimizer = torch.optim.Adam(denoiser.parameters())
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        optimizer.zero_grad()
        criterion(denoiser, two_latents(64), 8, seed=0, step=step)["loss"].backward()
        optimizer.step()
    x_0 = two_latents(4000)
    with torch.no_grad():
        learnt = criterion(denoiser, x_0, 8, seed=1, step=0)["bce"]
        best = DiffusionLoss(FEW_STEPS, "x_0")(knows_the_two, x_0, 8, seed=1, step=0)["bce"]
    assert best - 0.002 < learnt < best + 0.05
    assert abs(share_of_ones(denoiser, prediction) - 0.75) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "dice"}, "form: expected one of 'plain', 'balanced', 'focal', got 'dice'"),
        ({"weighting": "snr"}, "weighting: expected one of 'mean', 'weighted', got 'snr'"),
        ({"prediction": "noise"}, "prediction: expected one of 'flip', 'x_0', got 'noise'"),
        ({"rule": "euler"}, "rule: expected one of 'plugin', .*, got 'euler'"),
        ({"posterior_kl": -1.0}, "posterior_kl: expected >= 0, got -1.0"),
        ({"focal_gamma": -1.0}, "focal_gamma: expected >= 0, got -1.0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(SCHEDULE, **options)
