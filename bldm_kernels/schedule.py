"""BernoulliSchedule: how much signal is kept at every timestep, and the four numbers of every reverse step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks

KINDS = ("linear", "cosine", "sigmoid")
RULES = ("plugin", "marginal", "renoise", "ddim", "sample", "threshold")
# The slope of [f > 1/2] written as a ratio: steep enough that one unit in the last place of f decides.
THRESHOLD_SLOPE = 2.0**40


def _keep(kind: str, u: Tensor) -> Tensor:
    if kind == "linear":
        return 1 - u
    if kind == "cosine":
        return (1 + torch.cos(math.pi * u)) / 2
    o = torch.sigmoid(3 * u / 0.8)
    start, end = torch.sigmoid(torch.tensor([0.0, 3 / 0.8], dtype=torch.float64))
    return ((end - o) / (end - start)).clamp(0, 1)


class BernoulliSchedule:
    """The forward process q(x_t = 1 | x_0) = k_t x_0 + (1 - k_t) / 2 for t = 0 (clean) .. T.

    Args:
        kind: "linear" k = 1 - t / T, "cosine" k = (1 + cos(pi t / T)) / 2, or "sigmoid" (Chen 2023, start 0, end 3, tau 0.8).
        num_steps: T >= 1.

    Attributes: `kind` ("table" for `from_keep`), `num_steps` T, `keep` float64 (T + 1,) the kept signal k_t, `flip` float64
    (T + 1,) the flip probability (1 - k_t) / 2.
    """

    def __init__(self, kind: str = "linear", num_steps: int = 256):
        checks.option("kind", kind, KINDS)
        num_steps = checks.integer("num_steps", num_steps, 1, 10**6)
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        self._set(kind, _keep(kind, u))

    def _set(self, kind: str, keep: Tensor) -> None:
        self.kind = kind
        self.keep = keep
        self.flip = (1 - keep) / 2
        self.num_steps = keep.numel() - 1

    @classmethod
    def from_keep(cls, k: Sequence[float] | Tensor) -> "BernoulliSchedule":
        """A schedule from any table of k_t, t = 0..T: within [0, 1], not increasing; k_0 < 1 and k_T > 0 are allowed."""
        keep = torch.as_tensor(k, dtype=torch.float64).detach().cpu().clone()
        if keep.dim() != 1 or keep.numel() < 2:
            raise ValueError(f"k: expected T + 1 >= 2 values in one dimension, got shape {tuple(keep.shape)}")
        if not bool(((keep >= 0) & (keep <= 1)).all()):
            raise ValueError("k: expected values in [0, 1], got some outside")
        if bool((keep[1:] > keep[:-1]).any()):
            raise ValueError("k: expected values that do not increase with t")
        schedule = cls.__new__(cls)
        schedule._set("table", keep)
        return schedule

    def __repr__(self) -> str:
        return f"BernoulliSchedule({self.kind!r}, num_steps={self.num_steps})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BernoulliSchedule) and torch.equal(self.keep, other.keep)

    __hash__ = None  # type: ignore[assignment]

    def timesteps(self, num_sampling_steps: int) -> list[int]:
        """S descending timesteps from T to 1, spaced as the reference code does: 1 + int(linspace(0, 1, S) (T - 1)).

        One step starts at T (the reference's formula would start at 1, on pure noise), and S = T takes every step (there the
        formula's rounding would repeat some). Raises ValueError for S > T.
        """
        steps = checks.integer("num_sampling_steps", num_sampling_steps, 1, self.num_steps)
        if steps == 1:
            return [self.num_steps]
        if steps == self.num_steps:
            return list(range(steps, 0, -1))
        # In float64, as numpy.linspace does it: i * (1 / (S - 1)), the last value exactly 1.
        spacing = [i * (1.0 / (steps - 1)) for i in range(steps - 1)] + [1.0]
        return [1 + int(u * (self.num_steps - 1)) for u in reversed(spacing)]

    def coefficients(
        self,
        timesteps: Sequence[int] | Tensor,
        rule: str = "plugin",
        final: str | None = "threshold",
        *,
        sigma: float | None = None,
    ) -> Tensor:
        """The numbers (n0, n1, d0, d1) of P(x_s != x_t) = (n0 + n1 f) / (d0 + d1 f) for each reverse step.

        Row i is the step from timesteps[i] to timesteps[i + 1]; the last row goes to 0. f = P(x_0 != x_t).

        Args:
            timesteps: strictly descending ints in 1..T.
            rule: "plugin" (Wang et al. 2023, eq. 9: Bayes with the expected x_0), "marginal" (exact Bayes, averaged over x_0;
                Austin et al. 2021), "renoise" (sample x_0, then q(x_s | x_0)), "ddim" (keep with probability sigma, else
                sample x_0), "sample" (x_0 itself) or "threshold" (x_0 != x_t where f > 1/2).
            final: the rule of the last step; None: the same as `rule`.
            sigma: for "ddim", in [0, 1]; default (1 - k_s) / (1 - k_t) of each step.

        Returns: float32 (S, 4) on the CPU, computed in float64 and rounded so that P at f = 0 and f = 1 stays exact.
        """
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        steps = [checks.integer("timesteps", t, 1, self.num_steps) for t in values]
        if not steps:
            raise ValueError("timesteps: expected at least one, got none")
        if any(s >= t for t, s in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"timesteps: expected strictly descending, got {steps}")
        checks.option("rule", rule, RULES)
        final = rule if final is None else checks.option("final", final, RULES)
        if sigma is not None:
            if "ddim" not in (rule, final):
                raise ValueError(f"sigma: only the rule 'ddim' takes one, got rule {rule!r}")
            if not 0 <= checks.real("sigma", sigma) <= 1:
                raise ValueError(f"sigma: expected within [0, 1], got {sigma}")
        rules = [rule] * (len(steps) - 1) + [final]
        rows = [
            self._row(name, float(self.keep[t]), float(self.keep[s]), sigma)
            for name, t, s in zip(rules, steps, [*steps[1:], 0], strict=True)
        ]
        return torch.stack([_round_row(row) for row in rows])

    @staticmethod
    def _row(rule: str, k_t: float, k_s: float, sigma: float | None) -> tuple[float, float, float, float]:
        """(n0, n1, d0, d1) in float64 of one step from kept signal k_t to k_s >= k_t."""
        kappa = k_t / k_s if k_s > 0 else 0.0
        phi = (1 - k_s) / 2
        if rule == "plugin":
            n0, n1 = (1 - kappa) * phi, (1 - kappa) * k_s
            return n0, n1, n0 + (1 + kappa) * (1 - phi), n1 - (1 + kappa) * k_s
        if rule == "marginal":
            up, down = phi * (1 - kappa), (1 - phi) * (1 - kappa)
            a = up / (up + (1 - phi) * (1 + kappa))
            b = down / (down + phi * (1 + kappa)) if down > 0 else 0.0
            return a, b - a, 1.0, 0.0
        if rule == "renoise":
            return phi, k_s, 1.0, 0.0
        if rule == "ddim":
            if sigma is None:
                sigma = (1 - k_s) / (1 - k_t) if k_t < 1 else 1.0
            return 0.0, 1 - sigma, 1.0, 0.0
        if rule == "sample":
            return 0.0, 1.0, 1.0, 0.0
        return -THRESHOLD_SLOPE / 2, THRESHOLD_SLOPE, 1.0, 0.0


def _round_row(row: tuple[float, float, float, float]) -> Tensor:
    """Round to float32 keeping P(f = 0) = n0 / d0 and P(f = 1) = (n0 + n1) / (d0 + d1).

    d0 + d1 cancels where a step is short: its rounding moves the logit a little (by 1e-7 / (1 - kappa)), which is harmless, but
    taken alone it would move the end points, and with them certainty.
    """
    n0, n1, d0, d1 = row
    rounded_d0, rounded_d1 = torch.tensor([d0, d1], dtype=torch.float32)
    sum_d = float(rounded_d0 + rounded_d1)
    end = (n0 + n1) / (d0 + d1) * sum_d if d0 + d1 > 0 else 0.0
    rounded_n0 = torch.tensor(n0 / d0 * float(rounded_d0), dtype=torch.float32)
    rounded_n1 = torch.tensor(end - float(rounded_n0), dtype=torch.float32)
    return torch.stack([rounded_n0, rounded_n1, rounded_d0, rounded_d1])
