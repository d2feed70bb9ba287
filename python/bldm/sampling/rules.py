"""The numbers of every step: a reverse rule, its last step, and the schedule, as small tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bldm_kernels as bk
from bldm_kernels.schedule import RULES as STEP_RULES

RULES = (*STEP_RULES, "threshold-renoise")
FINALS = ("probability", *STEP_RULES)


@dataclass(frozen=True)
class StepTable:
    """`coefficients` (S, 4) of every step; `noise` (S, 4): of the flips after it, where `noisy` says there are some."""

    coefficients: Tensor
    noise: Tensor
    noisy: tuple[bool, ...]


def step_table(schedule: bk.BernoulliSchedule, timesteps: Sequence[int], rule: str, final: str | None) -> StepTable:
    """The tables of a rule of `BernoulliSchedule.coefficients`, or of one of these two:

    rule "threshold-renoise": x_0 by threshold, then every bit flipped with (1 - k_t) / 2 of the step's own t, until t = 1
        (binary-diffusion-tabular; note that the level is that of the step's start).
    final "probability": the last step draws nothing, it answers P(x_0 = 1).
    """
    bk.checks.option("rule", rule, RULES)
    if final is not None:
        bk.checks.option("final", final, FINALS)
    renoise = rule == "threshold-renoise"
    step_rule = "threshold" if renoise else rule
    coefficients = schedule.coefficients(timesteps, step_rule, "threshold" if final == "probability" else final)
    noisy = tuple(renoise and t != 1 for t in timesteps)
    if noisy[-1] and final == "probability":
        raise ValueError(f"final: 'probability' needs timesteps that end at 1 under the rule {rule!r}, got {timesteps[-1]}")
    flips = schedule.flip[torch.tensor(list(timesteps))].float()
    noise = torch.stack([flips, torch.zeros_like(flips), torch.ones_like(flips), torch.zeros_like(flips)], dim=-1)
    return StepTable(coefficients, noise, noisy)
