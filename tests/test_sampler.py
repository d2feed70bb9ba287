"""FastSampler: the distribution it draws from, the promises about seeds and batches, masks, guidance and callbacks."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from targets import Target
from tiny_models import tiny_denoiser
from torch import Tensor, nn

import bldm_kernels as bk
from bldm_kernels import reference

SHAPE = (2, 3)  # bits of the latents whose distribution is computed exactly: 64 states
STATES = (np.arange(64)[:, None] >> np.arange(6)) & 1
NUM_DRAWS = 2**17
RANDOM = np.random.default_rng(5)
COUPLING = RANDOM.normal(size=(6, 6)) * 0.8
DRIFT = RANDOM.normal(size=6)
LABELS = RANDOM.normal(size=(3, 6))
NULL = 2


def logits_of(bits: np.ndarray, t: int, label: int = NULL) -> np.ndarray:
    """(n, 6) bits of x_t -> (n, 6) logits: every bit looks at all of them, at the time and at the label."""
    return (2 * bits - 1) @ COUPLING + DRIFT * np.cos(t) + LABELS[label]


def denoiser(x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
    """`logits_of` as a denoiser of packed bits that is told t - 1."""
    bits = bk.unpack_bits(x, SHAPE[-1], torch.float64).flatten(1).numpy()
    labels = np.full(len(bits), NULL) if cond is None else cond.numpy()
    logits = np.empty(bits.shape)
    for label in np.unique(labels):
        rows = labels == label
        logits[rows] = logits_of(bits[rows], int(time[0]) + 1, label)
    return torch.from_numpy(logits).float().view(-1, *SHAPE)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass
class Case:
    """One set of sampling options, told to FastSampler and to the plain implementations below."""

    num_timesteps: int = 12
    kind: str = "linear"
    steps: int = 4
    timesteps: list[int] | None = None
    rule: str = "plugin"
    final: str | None = "threshold"
    prediction: str = "flip"
    temperature: float = 1.0
    label: int | None = None
    guidance: float = 0.0  # the paper's own g: (1 + g) conditional - g unconditional
    kept: dict[int, int] = field(default_factory=dict)  # bit -> value

    def keep(self) -> np.ndarray:
        """k_0..k_T; the linear one as the product of the paper's beta_t = 1 - 1 / (T - t + 1)."""
        t = np.arange(self.num_timesteps + 1)
        if self.kind == "linear":
            return np.cumprod([1.0] + [1 - 1 / (self.num_timesteps - i + 1) for i in t[1:]])
        if self.kind == "cosine":
            return (1 + np.cos(np.pi * t / self.num_timesteps)) / 2
        start, end = sigmoid(np.zeros(1)), sigmoid(np.array([3 / 0.8]))
        return np.clip((end - sigmoid(3 / 0.8 * t / self.num_timesteps)) / (end - start), 0, 1)

    def chosen(self) -> list[int]:
        """The paper's spacing of the steps."""
        if self.timesteps is not None:
            return self.timesteps
        spaced = np.linspace(0, 1, self.steps) * (self.num_timesteps - 1)
        return [1 + int(u) for u in spaced[::-1]]

    def probability_of_one(self, bits: np.ndarray, t: int) -> np.ndarray:
        """P(x_0 = 1 | x_t) as the denoiser says it."""
        logits = logits_of(bits, t, NULL if self.label is None else self.label)
        if self.guidance:
            logits = (1 + self.guidance) * logits - self.guidance * logits_of(bits, t)
        p = sigmoid(logits / self.temperature)
        return np.where(bits == 1, 1 - p, p) if self.prediction == "flip" else p

    def draw(self, seed: int = 0, num_samples: int = NUM_DRAWS, **options: Any) -> np.ndarray:
        """(num_samples, 6) bits by FastSampler."""
        sampler = bldm.FastSampler(
            denoiser,
            bk.BernoulliSchedule(self.kind, self.num_timesteps),
            latent_shape=SHAPE,
            prediction=self.prediction,
            rule=self.rule,
            final=self.final,
            time_label="t-1",
            null_cond=NULL,
        )
        if self.kept:
            mask, bits = torch.zeros(6), torch.zeros(6)
            for bit, value in self.kept.items():
                mask[bit], bits[bit] = 1, value
            options["keep_mask"], options["keep_bits"] = (bk.pack_bits(x.view(SHAPE)) for x in (mask, bits))
        packed = sampler.sample(
            num_samples,
            self.steps,
            timesteps=self.timesteps,
            temperature=self.temperature,
            seed=seed,
            cond=self.label,
            guidance_scale=1 + self.guidance,
            **options,
        )
        return bk.unpack_bits(packed, SHAPE[-1]).flatten(1).numpy()


# --- two plain implementations ----------------------------------------------------------------------------------------
def paper_loop(case: Case, rng: np.random.Generator) -> np.ndarray:
    """The sampling loop of the paper's own code, on floats: prior times the chain of one-step likelihoods, normalised."""
    keep, timesteps = case.keep(), case.chosen()

    def keep_some(x: np.ndarray) -> np.ndarray:
        for bit, value in case.kept.items():
            x[:, bit] = value
        return x

    x = keep_some(rng.integers(0, 2, (NUM_DRAWS, 6)).astype(float))
    for t, s in pairwise([*timesteps, 0]):
        p = case.probability_of_one(x, t)
        if t == 1:
            return keep_some((p > 0.5).astype(float))
        prior = keep[s] * p + (1 - keep[s]) / 2
        likelihood = x
        for r in range(t, s, -1):
            beta = keep[r] / keep[r - 1]
            likelihood = beta * likelihood + (1 - beta) / 2
        one, zero = prior * likelihood, (1 - prior) * (1 - likelihood)
        x = keep_some((rng.random(x.shape) < one / (one + zero)).astype(float))
    raise AssertionError("the last timestep is 1")


def q(same: np.ndarray, kept: float) -> np.ndarray:
    return np.where(same, 1 + kept, 1 - kept) / 2


def reverse_probability(case: Case, rule: str, x_t: np.ndarray, p: np.ndarray, k_t: float, k_s: float) -> np.ndarray:
    """P(x_s = 1 | x_t) of every bit by summing over x_0 and x_s, p = P(x_0 = 1 | x_t)."""
    if rule == "threshold":
        return (p > 0.5).astype(float)
    if rule == "sample":
        return p
    if rule == "ddim":
        sigma = (1 - k_s) / (1 - k_t)
        return sigma * x_t + (1 - sigma) * p
    prior = {0: 1 - p, 1: p}
    if rule == "renoise":
        return sum(prior[x_0] * q(x_0 == np.ones_like(x_t), k_s) for x_0 in (0, 1))
    # joint[x_0][x_s] = P(x_t | x_s) P(x_s | x_0)
    joint = {x_0: [q(x_t == x_s, k_t / k_s) * q(np.full(x_t.shape, x_s == x_0), k_s) for x_s in (0, 1)] for x_0 in (0, 1)}
    if rule == "marginal":
        return sum(prior[x_0] * joint[x_0][1] / (joint[x_0][0] + joint[x_0][1]) for x_0 in (0, 1))
    weights = [sum(prior[x_0] * joint[x_0][x_s] for x_0 in (0, 1)) for x_s in (0, 1)]
    return weights[1] / (weights[0] + weights[1])


def exact_distribution(case: Case) -> np.ndarray:
    """(64,) probabilities of the final state: a product of 64 x 64 float64 matrices."""
    keep, timesteps = case.keep(), case.chosen()
    start = np.full(STATES.shape, 0.5)

    def to_joint(ones: np.ndarray) -> np.ndarray:
        """Independent bits with P(1) = ones (n, 6) -> (n, 64)."""
        ones = ones.copy()
        for bit, value in case.kept.items():
            ones[:, bit] = value
        return np.prod(np.where(STATES[None] == 1, ones[:, None], 1 - ones[:, None]), -1)

    distribution = to_joint(start)[0]
    for t, s in pairwise([*timesteps, 0]):
        rule = (case.final or case.rule) if s == 0 else case.rule
        p = case.probability_of_one(STATES, t)
        distribution = distribution @ to_joint(reverse_probability(case, rule, STATES, p, keep[t], keep[s]))
    return distribution


def state_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(int) << np.arange(6)).sum(-1)


# --- the distribution -------------------------------------------------------------------------------------------------
PAPER_CASES = {
    "every step": Case(num_timesteps=6, steps=6),
    "strided": Case(),
    "strided cosine": Case(kind="cosine", num_timesteps=20, steps=5),
    "strided sigmoid": Case(kind="sigmoid", num_timesteps=20, steps=5),
    "own timesteps": Case(timesteps=[11, 10, 4, 1]),
    "x_0 prediction": Case(prediction="x_0"),
    "temperature": Case(temperature=0.6),
    "x_0 temperature": Case(prediction="x_0", temperature=1.7, steps=6),
    "conditional": Case(label=1),
    "guidance": Case(label=1, guidance=1.5),
    "guidance, x_0, temperature": Case(label=0, guidance=0.7, prediction="x_0", temperature=0.8),
    "mask": Case(kept={0: 1, 3: 0, 5: 1}),
    "mask, x_0": Case(kept={1: 0, 2: 1}, prediction="x_0"),
}


@functools.cache
def drawn(name: str) -> np.ndarray:
    return EXACT_CASES[name].draw()


@pytest.mark.parametrize("name", PAPER_CASES)
def test_marginals_are_those_of_the_papers_loop(name: str) -> None:
    case = PAPER_CASES[name]
    expected = paper_loop(case, np.random.default_rng(1)).mean(0)
    got = drawn(name).mean(0)
    pooled = (expected + got) / 2
    error = np.sqrt(2 * pooled * (1 - pooled) / NUM_DRAWS)
    assert (np.abs(got - expected) <= 5 * error).all(), (got, expected)
    free = [i for i in range(6) if i not in case.kept]
    assert ((got > 0.001) & (got < 0.999))[free].any(), "a test of certain bits tests nothing"


EXACT_CASES = PAPER_CASES | {
    "marginal": Case(rule="marginal"),
    "marginal every step": Case(rule="marginal", num_timesteps=6, steps=6, final="sample"),
    "marginal cosine guidance": Case(rule="marginal", kind="cosine", label=1, guidance=1.0, temperature=0.9),
    "marginal x_0 mask": Case(rule="marginal", prediction="x_0", kept={2: 1}, final="sample"),
    "plugin to the end": Case(final=None),
    "renoise": Case(rule="renoise"),
    "ddim": Case(rule="ddim", final="sample"),
    "one step": Case(timesteps=[12], final="sample"),
}


@pytest.mark.parametrize("name", EXACT_CASES)
def test_the_joint_distribution_is_that_of_the_exact_chain(name: str) -> None:
    expected = exact_distribution(EXACT_CASES[name])
    assert math.isclose(expected.sum(), 1)
    counts = np.bincount(state_of(drawn(name)), minlength=64)
    error = np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert (np.abs(counts / NUM_DRAWS - expected) <= 5 * error + 3 / NUM_DRAWS).all()
    possible = expected > 1e-12
    expected_counts = expected[possible] * NUM_DRAWS
    chi_square = ((counts[possible] - expected_counts) ** 2 / expected_counts)[expected_counts > 5].sum()
    freedom = (expected_counts > 5).sum()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    assert counts[~possible].sum() == 0


def test_plugin_and_marginal_are_different_distributions() -> None:
    """So that the tests above would notice one being taken for the other."""
    plugin, marginal = (exact_distribution(Case(rule=rule)) for rule in ("plugin", "marginal"))
    assert np.abs(plugin - marginal).max() > 0.005  # three standard errors and more


# --- the seed ---------------------------------------------------------------------------------------------------------
GRID = (3, 2, 13)  # bits that do not fill their bytes


class Mixer(nn.Module):
    """A denoiser in exact arithmetic: the same logits in any batch, on any device."""

    def __init__(self, shape: tuple[int, ...] = GRID, num_labels: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = math.prod(shape)
        self.shape = shape
        self.null_label = num_labels
        self.register_buffer("mix", torch.randint(-2, 3, (size, size), generator=generator) / 8.0)
        self.register_buffer("drift", torch.randint(-9, 10, (num_labels + 1, size), generator=generator) / 8.0)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), time, cond))
        bits = reference.unpack_bits(x, self.shape[-1]) if x.dtype == torch.uint8 else x
        logits = bits.flatten(1) @ self.mix + time[:, None] / 8
        return (logits if cond is None else logits + self.drift[cond]).view(-1, *self.shape)


def mixer_sampler(device: str = "cpu", **options: Any) -> bldm.FastSampler:
    arguments: dict[str, Any] = {"latent_shape": GRID, **options}
    return bldm.FastSampler(Mixer().to(device), bk.BernoulliSchedule("linear", 16), **arguments)


def test_same_seed_same_samples_for_any_batch_split(target: Target) -> None:
    """1 x 64, 64 x 1 and 7 + 57, with labels and guidance, and as the reference draws them."""
    cond = torch.arange(64) % 4
    steps = 4 if target.fast else 1
    options: dict[str, Any] = {"steps": steps, "seed": 2**63 + 11, "guidance_scale": 1.5}
    sampler = mixer_sampler(target.device, final="sample")
    together = sampler.sample(64, cond=cond, **options)
    assert together.shape == (64, 3, 2, 2) and together.dtype == torch.uint8
    one_by_one = sampler.sample(64, cond=cond, batch_size=1, **options)
    parts = [
        sampler.sample(7, cond=cond[:7], **options),
        sampler.sample(57, cond=cond[7:], sample_offset=7, **options),
    ]
    assert torch.equal(one_by_one, together)
    assert torch.equal(torch.cat(parts), together)
    with bk.use_backend("torch"):
        assert torch.equal(mixer_sampler(final="sample").sample(64, cond=cond, **options), together.cpu())


def test_batch_size_and_sample_offset_together() -> None:
    sampler = mixer_sampler()
    together = sampler.sample(20, 5, seed=1)
    assert torch.equal(sampler.sample(15, 5, seed=1, sample_offset=5, batch_size=4), together[5:])


def test_different_seeds_steps_and_samples_differ() -> None:
    sampler = mixer_sampler()
    first = sampler.sample(32, seed=0)
    assert torch.equal(first, sampler.sample(32, seed=0))
    bits = 32 * math.prod(GRID)
    for other in (sampler.sample(32, seed=1), sampler.sample(32, seed=0, sample_offset=32)):
        assert int(bk.hamming_distance(first, other).sum()) > bits / 5
    assert len({bytes(row.flatten().tolist()) for row in first}) == 32


def test_no_samples() -> None:
    empty = mixer_sampler().sample(0, cond=1, guidance_scale=2.0)
    assert empty.shape == (0, 3, 2, 2) and empty.dtype == torch.uint8


def test_padding_bits_stay_zero() -> None:
    assert int((mixer_sampler().sample(64)[..., -1] >> 5).sum()) == 0


# --- what the denoiser is given ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("time_label, shift", [("t", 0), ("t-1", 1)])
def test_time_labels(time_label: str, shift: int) -> None:
    sampler = mixer_sampler(time_label=time_label)
    sampler.sample(2, 4)
    times = [time for _, time, _ in sampler.denoiser.calls]
    assert all(time.dtype == torch.int64 for time in times)
    assert [time.tolist() for time in times] == [[t - shift] * 2 for t in sampler.schedule.timesteps(4)]


@pytest.mark.parametrize(
    "state, form",
    [
        ("packed", lambda x: x),
        ("bits", lambda x: bk.unpack_bits(x, 13)),
        ("signs", lambda x: 2 * bk.unpack_bits(x, 13) - 1),
    ],
)
def test_states(state: str, form: Callable[[Tensor], Tensor]) -> None:
    sampler = mixer_sampler(state=state)
    sampler.sample(3, 2, seed=4)
    given = sampler.denoiser.calls[0][0]
    expected = form(bk.random_bits(3, GRID, seed=4))
    assert given.dtype == expected.dtype and torch.equal(given, expected)


def test_explicit_timesteps() -> None:
    sampler = mixer_sampler()
    seen: list[int] = []
    sampler.sample(2, timesteps=[15, 9, 8, 2], callback=lambda info: seen.append(info.timestep))
    assert seen == [15, 9, 8, 2]
    usual = sampler.schedule.timesteps(5)
    assert torch.equal(sampler.sample(8, timesteps=torch.tensor(usual)), sampler.sample(8, 5))


def test_one_int_is_a_condition_for_all() -> None:
    sampler = mixer_sampler()
    expected = sampler.sample(5, cond=torch.full((5,), 3))
    assert torch.equal(sampler.sample(5, cond=3), expected)
    assert torch.equal(sampler.sample(5, cond=torch.tensor(3)), expected)
    assert not torch.equal(sampler.sample(5, cond=0), expected)


def test_guidance_in_one_call_is_guidance_in_two() -> None:
    sampler = mixer_sampler()
    cond = torch.tensor([0, 1, 2, 3, 0])
    got = sampler.sample(5, 4, cond=cond, guidance_scale=2.5, seed=8)
    assert [len(x) for x, _, _ in sampler.denoiser.calls] == [10] * 4
    x = bk.random_bits(5, GRID, seed=8)
    timesteps = sampler.schedule.timesteps(4)
    coefficients = sampler.schedule.coefficients(timesteps)
    for i, t in enumerate(timesteps):
        time = torch.full((5,), t)
        logits = sampler.denoiser(x, time, cond)
        uncond = sampler.denoiser(x, time, torch.full((5,), sampler.denoiser.null_label))
        guide = {"uncond_logits": uncond, "guidance_scale": 2.5}
        x = bk.flip_step(logits, x, coefficients[i], seed=8, step=i, **guide)
    assert torch.equal(got, x)


def test_guidance_scale_one_needs_no_second_half() -> None:
    sampler = mixer_sampler()
    sampler.sample(5, 3, cond=1, guidance_scale=1.0)
    assert [len(x) for x, _, _ in sampler.denoiser.calls] == [5] * 3


def test_vector_conditions_and_a_null_vector() -> None:
    """A text embedding is a condition like another; the null one is broadcast."""
    seen: list[Tensor] = []

    def denoiser(x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        seen.append(cond)
        return cond.sum(-1).view(-1, 1, 1).expand(-1, 4, 8)

    null = torch.full((6,), -1.0)
    sampler = bldm.FastSampler(denoiser, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8), null_cond=null)
    sampler.sample(3, 2, cond=torch.ones(3, 6), guidance_scale=3.0)
    assert torch.equal(seen[0], torch.cat([torch.ones(3, 6), null.expand(3, 6)]))


# --- masks, callbacks, modes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_sample", [False, True])
def test_kept_bits_are_kept_in_every_state(per_sample: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (6, *GRID) if per_sample else GRID
    mask, kept = (bk.pack_bits(torch.rand(shape, generator=generator) < 0.5) for _ in range(2))
    sampler = mixer_sampler()
    states: list[Tensor] = []
    options: dict[str, Any] = {"seed": 1, "keep_mask": mask, "keep_bits": kept}
    result = sampler.sample(6, 5, callback=lambda info: states.append(info.x), **options)
    given = [x for x, _, _ in sampler.denoiser.calls]
    for x in (*given, *states, result):
        assert torch.equal(x & mask, (kept & mask).expand_as(x))
    assert torch.equal(given[0] & ~mask, bk.random_bits(6, GRID, seed=1) & ~mask)
    assert not torch.equal(result & ~mask, given[0] & ~mask)
    assert torch.equal(sampler.sample(6, 5, batch_size=4, **options), result)


def test_callback() -> None:
    """Once a step and batch, in order, with a state that stays as it was."""
    sampler = mixer_sampler()
    infos: list[bldm.StepInfo] = []
    copies: list[Tensor] = []

    def callback(info: bldm.StepInfo) -> None:
        infos.append(info)
        copies.append(info.x.clone())

    result = sampler.sample(10, 3, batch_size=4, callback=callback)
    timesteps = sampler.schedule.timesteps(3)
    assert [(i.step, i.num_steps, i.timestep, i.first_sample, i.num_samples) for i in infos] == [
        (step, 3, timesteps[step], first, count) for first, count in ((0, 4), (4, 4), (8, 2)) for step in range(3)
    ]
    assert all(torch.equal(info.x, copy) for info, copy in zip(infos, copies, strict=True))
    assert torch.equal(torch.cat([infos[i].x for i in (2, 5, 8)]), result)
    with_shape = {tuple(info.x.shape[1:]) for info in infos}
    assert with_shape == {(3, 2, 2)}


def test_autocast() -> None:
    """The denoiser runs in the dtype asked for, and its logits are used as they come."""
    dtypes: list[torch.dtype] = []

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            logits = self.linear(x)
            dtypes.append(logits.dtype)
            return logits

    options: dict[str, Any] = {"latent_shape": (4, 8), "state": "bits"}
    for autocast in (None, torch.bfloat16):
        bldm.FastSampler(Linear(), bk.BernoulliSchedule("linear", 8), autocast=autocast, **options).sample(2, 1)
    assert dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("raises", [False, True])
def test_modes_are_restored(raises: bool) -> None:
    """Dropout is off while sampling; afterwards every part is in the mode it was in, whatever happened."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(), nn.Dropout()
            self.seen: list[bool] = []

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            self.seen.append(self.training or self.dropout.training or self.frozen.training)
            if raises:
                raise KeyError("broken")
            return torch.zeros(len(x), 4, 8)

    model = Dropping().train()
    model.frozen.eval()
    sampler = bldm.FastSampler(model, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8))
    if raises:
        with pytest.raises(KeyError):
            sampler.sample(2, 2)
    else:
        sampler.sample(2, 2)
    assert not any(model.seen)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    model.eval()
    model.dropout.train()
    model.seen.clear()
    with pytest.raises(KeyError) if raises else torch.no_grad():
        sampler.sample(2, 2)
    assert not any(model.seen) and model.dropout.training and not model.training


def test_sampling_keeps_no_graph() -> None:
    sampler = bldm.FastSampler(tiny_denoiser(), bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8))
    states: list[Tensor] = []
    sampler.sample(2, 2, cond=0, callback=lambda info: states.append(info.x))
    assert not any(x.requires_grad for x in states) and torch.is_grad_enabled()


# --- errors while sampling --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_reported(target: Target, value: float) -> None:
    def broken(x: Tensor, time: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 4, 8, device=x.device)
        if int(time[0]) == 6:
            logits[0, 1, :3] = value
        return logits

    sampler = bldm.FastSampler(broken, bk.BernoulliSchedule("linear", 8), latent_shape=(4, 8), device=target.device)
    with pytest.raises(FloatingPointError, match=r"3 logits are not finite at step 1 \(timestep 6\)"):
        sampler.sample(2, timesteps=[8, 6, 1])


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (torch.zeros(2, 4, 7), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(2, 4, 7\)"),
        (torch.zeros(1, 4, 8), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(1, 4, 8\)"),
        (torch.zeros(2, 8, 4), ValueError, r"denoiser: expected logits of shape \(2, 4, 8\), got \(2, 8, 4\)"),
        (torch.zeros(2, 4, 8).long(), TypeError, "logits: expected dtype float32 or .*, got int64"),
        ((torch.zeros(2, 4, 8),), TypeError, "logits: expected a torch.Tensor, got tuple"),
    ],
)
def test_answers_that_are_no_logits(answer: Any, error: type[Exception], message: str) -> None:
    schedule = bk.BernoulliSchedule("linear", 8)
    sampler = bldm.FastSampler(lambda x, time: answer, schedule, latent_shape=(4, 8))
    with pytest.raises(error, match=message):
        sampler.sample(2, 2)


def test_positions_may_come_flat_and_not_contiguous() -> None:
    """A transformer answers (B, N, C) for latents (h, w, C)."""
    logits = torch.linspace(-2, 2, 3 * 2 * 13 * 5).view(13, 6, 5).permute(2, 1, 0)
    schedule = bk.BernoulliSchedule("linear", 8)
    flat = bldm.FastSampler(lambda x, time: logits, schedule, latent_shape=GRID).sample(5, 2)
    grid = bldm.FastSampler(lambda x, time: logits.reshape(5, *GRID), schedule, latent_shape=GRID).sample(5, 2)
    assert torch.equal(flat, grid)


# --- a compiled step --------------------------------------------------------------------------------------------------
def test_a_whole_step_compiles_without_graph_breaks() -> None:
    """Denoiser and flip_step in one graph; given the compiled logits, the bits are those of eager mode."""
    model = tiny_denoiser().eval()
    schedule = bk.BernoulliSchedule("linear", 16)
    coefficients = schedule.coefficients([16, 9, 1])

    def step(x: Tensor, time: Tensor, cond: Tensor, row: Tensor, seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x, time, cond)
        return bk.flip_step(logits, x, row, seed=seed, step=index, temperature=0.9), logits

    compiled = torch.compile(step, fullgraph=True)
    x = bk.random_bits(4, (4, 8), seed=0)
    cond, seed = torch.arange(4) % 3, torch.tensor([5])
    with torch.no_grad():
        for i, t in enumerate((16, 9, 1)):
            arguments = (x, torch.full((4,), t), cond, coefficients[i], seed, torch.tensor([i]))
            bits, logits = compiled(*arguments)
            expected = bk.flip_step(logits, x, coefficients[i], seed=5, step=i, temperature=0.9)
            assert torch.equal(bits, expected)
            assert torch.allclose(logits, step(*arguments)[1], atol=1e-4)
            x = bits
