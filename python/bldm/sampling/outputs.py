"""How a denoiser's answer becomes logits, and what those logits are of.

An output says what is predicted ("flip": x_0 != x_t, "x_0": x_0 = 1) and how to read the logits from the raw answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

Read = Callable[[Any], Tensor]
# A logit beyond this is as good as certain: the step clamps exp(-l) to 2^-64..2^64.
CERTAIN = 90.0


def logits(answer: Any) -> Any:
    """The answer is the logits."""
    return answer


def probabilities(answer: Tensor) -> Tensor:
    """The answer is a probability (a sigmoid inside the model): its logit, finite at exactly 0 and 1; outside of [0, 1] NaN."""
    bk.checks.floating("denoiser: probabilities", answer)
    return torch.logit(answer.float()).clamp(-CERTAIN, CERTAIN)


def two_class(dim: int = 1) -> Read:
    """The answer holds the logits of two classes along `dim` (a softmax with K = 2): their difference."""

    def read(answer: Tensor) -> Tensor:
        if answer.shape[dim] != 2:
            raise ValueError(f"denoiser: expected two classes along dimension {dim}, got shape {tuple(answer.shape)}")
        zero, one = answer.unbind(dim)
        return one - zero

    return read


def chunk(index: int, count: int = 2, dim: int = 1) -> Read:
    """The answer holds several predictions along `dim`: one of them."""
    return lambda answer: answer.chunk(count, dim)[index]


def decided_at(read: Read, probability: float) -> Read:
    """Logits moved so that the last step's decision f > 1/2 is the model's p > `probability`."""
    if probability == 0.5:
        return read
    shift = math.log(probability / (1 - probability))
    return lambda answer: read(answer) - shift


@dataclass(frozen=True)
class Output:
    """What is predicted ("flip" or "x_0") and how it is read."""

    prediction: str = "flip"
    read: Read = logits

    def __post_init__(self) -> None:
        bk.checks.option("prediction", self.prediction, ("flip", "x_0"))


READS: dict[str, Read] = {"logits": logits, "probabilities": probabilities, "two-class": two_class()}
