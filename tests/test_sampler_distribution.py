"""FastSampler draws from the right distribution: against two plain implementations, one of them exact."""

import functools
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from torch import Tensor

import bldm_kernels as bk

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
