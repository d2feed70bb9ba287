"""Schedules and reverse rules against brute-force Bayes on the two-state chain, in float64.

The brute force multiplies the one-step transition matrices and sums over every x_0 and x_s; it shares no formula with
schedule.py, which has them in closed form.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch

import bldm_kernels as bk

# 5 values of k with k_0 < 1 and k_T > 0, and one that is flat and reaches 0 early.
TABLES = {"noisy_ends": [0.98, 0.9, 0.55, 0.3, 0.05], "flat": [1.0, 1.0, 0.7, 0.7, 0.4, 0.0, 0.0]}
SCHEDULES = {
    **{f"{kind}{T}": bk.BernoulliSchedule(kind, T) for kind in ("linear", "cosine", "sigmoid") for T in (1, 2, 16, 256)},
    **{name: bk.BernoulliSchedule.from_keep(k) for name, k in TABLES.items()},
}
RULES = ("plugin", "marginal", "renoise", "ddim", "sample", "threshold")
FLIP = np.array([0.0, 1e-9, 1e-4, 0.03, 0.3, 0.4999, 0.5001, 0.77, 0.999, 1 - 1e-9, 1.0])


def steps_of(schedule: bk.BernoulliSchedule) -> list[list[int]]:
    """Every step, strides, uneven strides and a single leap."""
    T = schedule.num_steps
    lists = [list(range(T, 0, -1)), list(range(T, 0, -3)), schedule.timesteps(max(T // 2, 1)), [T], [1]]
    return [steps for steps in lists if len(steps) <= 64 or T <= 256]


def one_step(keep: float) -> np.ndarray:
    """Transition matrix [from, to] that keeps the bit with probability (1 + keep) / 2."""
    return np.array([[1 + keep, 1 - keep], [1 - keep, 1 + keep]]) / 2


@cache
def transitions(k: tuple[float, ...], s: int, t: int) -> np.ndarray:
    """q(x_t | x_s), one step after another; s = -1 is the clean x_0 before step 0."""
    matrix = np.eye(2)
    for i in range(s + 1, t + 1):
        before = k[i - 1] if i else 1.0
        matrix = matrix @ one_step(k[i] / before if before > 0 else 0.0)
    return matrix


def brute_force(rule: str, k: tuple[float, ...], t: int, s: int, f: float, x_t: int) -> float:
    """P(x_s != x_t) when the denoiser says P(x_0 != x_t) = f, by enumeration of x_0 and x_s."""
    other = 1 - x_t
    clean = np.zeros(2)
    clean[x_t], clean[other] = 1 - f, f
    to_s, s_to_t = transitions(k, -1, s), transitions(k, s, t)
    if rule == "plugin":  # Bayes with the expected x_0 in place of x_0: the reference's formula
        joint = (clean @ to_s) * s_to_t[:, x_t]
        return joint[other] / joint.sum()
    if rule == "marginal":  # exact: average the posterior of each x_0
        total = 0.0
        for x_0 in (0, 1):
            joint = to_s[x_0] * s_to_t[:, x_t]
            total += clean[x_0] * joint[other] / joint.sum() if clean[x_0] > 0 else 0.0
        return total
    if rule == "renoise":
        return (clean @ to_s)[other]
    if rule == "ddim":  # keep x_t with probability sigma, else draw x_0
        return (1 - (1 - k[s]) / (1 - k[t])) * f if k[t] < 1 else 0.0
    return f if rule == "sample" else float(f > 0.5)


def evaluate(row: torch.Tensor, f: float) -> float:
    n0, n1, d0, d1 = (float(c) for c in row)
    return min(max((n0 + n1 * f) / (d0 + d1 * f), 0.0), 1.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_are_bayes(name: str, rule: str) -> None:
    """float32 coefficients, for both values of x_t: P within 2e-6, the certain cases (f = 0 and 1) to 7 digits.

    The denominator of a short step cancels: there rounding may move the logit of P by 2e-7 / (1 - kappa), kappa = k_t / k_s.
    """
    schedule = SCHEDULES[name]
    k = tuple(schedule.keep.tolist())
    for steps in steps_of(schedule):
        rows = schedule.coefficients(steps, rule, None)
        assert rows.shape == (len(steps), 4) and rows.dtype == torch.float32
        for row, t, s in list(zip(rows, steps, [*steps[1:], 0], strict=True))[:: max(len(steps) // 8, 1)]:
            for f in FLIP:
                # x_0 = anything else is impossible where the table says that x_t must equal x_0: there P has no meaning.
                if rule in ("plugin", "marginal") and k[t] == 1 and f > 0:
                    continue
                for x_t in (0, 1):
                    truth = brute_force(rule, k, t, s, float(f), x_t)
                    got = evaluate(row, float(f))
                    lost = max(1 - k[t] / k[s], 1e-9) if k[s] > 0 else 1.0
                    assert got == pytest.approx(truth, abs=2e-6 + 2e-7 / lost * truth * (1 - truth)), (t, s, f)
                    if f in (0.0, 1.0):
                        assert got == pytest.approx(truth, rel=3e-7, abs=1e-30), (t, s, f)


@pytest.mark.parametrize("rule", ["plugin", "marginal", "renoise", "ddim", "sample"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_in_float64(name: str, rule: str) -> None:
    """Before rounding to float32 the four numbers are exact."""
    schedule = SCHEDULES[name]
    k = tuple(schedule.keep.tolist())
    T = schedule.num_steps
    pairs = {(T, T - 1), (T, 0), (T, T // 2), (max(T // 2, 1), 0), (1, 0), (T, max(T - 3, 0))}
    for t, s in pairs:
        row = torch.tensor(schedule._row(rule, float(k[t]), float(k[s]), None), dtype=torch.float64)
        for f in FLIP:
            if rule in ("plugin", "marginal") and k[t] == 1 and f > 0:
                continue
            assert evaluate(row, f) == pytest.approx(brute_force(rule, k, t, s, f, 0), rel=1e-9, abs=1e-15)


def test_plugin_and_marginal_differ() -> None:
    """They are different distributions: at a large stride by tens of percent on one bit."""
    schedule = bk.BernoulliSchedule("linear", 256)
    rows = {rule: schedule.coefficients([192, 8], rule, None)[0] for rule in ("plugin", "marginal")}
    widest = max(abs(evaluate(rows["plugin"], f) - evaluate(rows["marginal"], f)) for f in np.linspace(0, 1, 1001))
    assert widest > 0.1


def test_final_rule() -> None:
    schedule = bk.BernoulliSchedule("cosine", 32)
    steps = [32, 16, 4]
    for final in RULES:
        rows = schedule.coefficients(steps, "plugin", final)
        assert torch.equal(rows[:2], schedule.coefficients([*steps], "plugin")[:2])
        assert torch.equal(rows[2], schedule.coefficients(steps, final, None)[2])
    threshold = schedule.coefficients(steps)[2]
    assert evaluate(threshold, 0.5 - 1e-7) == 0 and evaluate(threshold, 0.5 + 1e-7) == 1


def test_threshold_step_is_deterministic() -> None:
    logits = torch.tensor([[-3.0, -1e-6, 0.0, 1e-6, 2.0, 60.0, -60.0, 0.5]])
    row = bk.BernoulliSchedule().coefficients([1])[0]
    for seed in range(20):
        x = bk.flip_step(logits, torch.zeros(1, 1, dtype=torch.uint8), row, seed=seed, step=0)
        assert torch.equal(x, bk.pack_bits(logits > 0))


def test_ddim_sigma() -> None:
    schedule = bk.BernoulliSchedule("linear", 10)
    row = schedule.coefficients([9, 3], "ddim", None, sigma=0.25)[0]
    assert evaluate(row, 0.4) == pytest.approx(0.75 * 0.4)
    default = schedule.coefficients([9, 3], "ddim", None)[0]
    sigma = (1 - 0.7) / (1 - 0.1)
    assert evaluate(default, 0.4) == pytest.approx((1 - sigma) * 0.4, rel=1e-6)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 64, 100, 256, 1000])
def test_timesteps_equal_the_reference_formula(T: int) -> None:
    """reversed(1 + int(linspace(0, 1, S) (T - 1))) for 1 < S < T; one step starts at T, and T steps are all of them."""
    schedule = bk.BernoulliSchedule("linear", T)
    for S in range(2, T):
        reference = 1 + (np.linspace(0.0, 1.0, S) * (T - 1)).astype(int)
        assert schedule.timesteps(S) == reference[::-1].tolist(), S
    assert schedule.timesteps(1) == [T]
    assert schedule.timesteps(T) == list(range(T, 0, -1))


def test_timesteps_are_usable() -> None:
    for T in (2, 17, 64, 256):
        schedule = bk.BernoulliSchedule("sigmoid", T)
        for S in range(1, T + 1):
            steps = schedule.timesteps(S)
            assert len(steps) == S and steps[0] == T and steps[-1] >= 1
            assert all(a > b for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("T", [1, 64, 1000])
def test_kinds(T: int) -> None:
    """The stated formulas, k_0 = 1 and k_T = 0."""
    u = [t / T for t in range(T + 1)]

    def o(x: float) -> float:
        return 1 / (1 + math.exp(-3 * x / 0.8))

    expected = {
        "linear": [1 - x for x in u],
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in u],
        "sigmoid": [min(max((o(1) - o(x)) / (o(1) - o(0)), 0), 1) for x in u],
    }
    for kind, keep in expected.items():
        schedule = bk.BernoulliSchedule(kind, T)
        assert schedule.keep.dtype == torch.float64 and schedule.num_steps == T
        np.testing.assert_allclose(schedule.keep.numpy(), keep, rtol=0, atol=1e-15)
        np.testing.assert_allclose(schedule.flip.numpy(), (1 - np.array(keep)) / 2, rtol=0, atol=1e-15)
        assert float(schedule.keep[0]) == 1 and abs(float(schedule.keep[-1])) < 1e-15


def test_from_keep_copies_and_compares() -> None:
    k = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    schedule = bk.BernoulliSchedule.from_keep(k)
    k[1] = 0.9
    assert float(schedule.keep[1]) == 0.5
    assert schedule == bk.BernoulliSchedule.from_keep([1.0, 0.5, 0.25])
    assert schedule != bk.BernoulliSchedule("linear", 2)
    assert "table" in repr(schedule)


def test_forward_noise_follows_the_schedule() -> None:
    """add_noise with schedule.flip[t] keeps k_t of the signal."""
    schedule = bk.BernoulliSchedule("cosine", 10)
    x_0 = bk.random_bits(50, (64, 64), seed=1)
    for t in (1, 5, 9):
        x_t = bk.add_noise(x_0, float(schedule.flip[t]), seed=2, step=t)
        rate = float(bk.hamming_distance(x_0, x_t).sum()) / (50 * 64 * 64)
        assert 1 - 2 * rate == pytest.approx(float(schedule.keep[t]), abs=0.01)
