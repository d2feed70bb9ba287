"""Weights, rounded, so that the products with them are right in the mean.

Behind a norm: what the norm subtracts from a row, its mean, no row of such weights sees.

    W ((x - m) r) = r W x        if the rows of W add up to 0

A norm's result has mean 0, so that a number may be taken from all weights of a row: its mean, before it is rounded. Rounding
leaves a sum behind again, as large as that of so many errors of rounding; so those weights are rounded to their other neighbour
that lie about halfway between both.

In e4m3, whose steps are large: a rounded value has a little less than itself in common with the value, <x, q> < <x, x>, because
what rounds to q lies around q, and so the error is orthogonal to q and not to x. Of both factors of a product that is lost, in
every layer; the scale of the weights makes up for it.
"""

import math

import torch
from torch import Tensor

from .attention import E4M3

PASSES = 3  # the first one leaves half a step of a typical weight, the next ones have smaller steps for that
BITS = {torch.bfloat16: torch.int16, E4M3: torch.int8}
# What e4m3 leaves of <x, x>, for values whose logarithms are spread evenly: 1 less the mean square of an error within a step of
# 2^n / 8, over that of the values between 2^n and 2^(n + 1).
IN_COMMON = 1 - (2**-6 / 12) / (3 / (2 * math.log(2)))


def centred(weight: Tensor) -> Tensor:
    """Rows (N, K) without their means: the same behind a norm."""
    return weight - weight.mean(1, keepdim=True)


def round_centred(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Centred rows (N, K) of float64, within what dtype can hold, each value rounded to one of its two neighbours in dtype, most
    of them to the nearer one, such that the rows add up to 0 but for less than the rounding of a single weight. Only bfloat16 and
    e4m3 need the choice; others are rounded as usual."""
    rounded = weight.to(dtype)
    if dtype in BITS:
        for _ in range(PASSES):
            rounded = _nearer_to_zero_sum(rounded, weight)
    return rounded


def lengthened(scale: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
    """The scale (1,) of weights (N, K) in e4m3, `rounded` from weight / scale, for inputs in e4m3: so much longer that as much of
    the product is there, in the mean, as of the exact one. weight and scale: float64."""
    common = (weight * rounded.double()).sum() * scale
    return torch.where(common > 0, scale * weight.square().sum() / common, scale) / IN_COMMON


def _nearer_to_zero_sum(rounded: Tensor, weight: Tensor) -> Tensor:
    """Some values a step against the sum of their row, those first that it costs the least squared error for what it corrects."""
    values = rounded.double()
    total = values.sum(1, keepdim=True)
    direction = -total.sign()
    others = _neighbours(rounded, direction)
    step, error = (others.double() - values).abs(), (weight - values) * direction
    possible = (step < 2 * total.abs()) & (error > 0)  # else it is not the other neighbour, or would make the sum larger; not NaN
    step = torch.where(possible, step, 0)
    cost = torch.where(possible, step - 2 * error, torch.inf)
    order = cost.argsort(dim=1, stable=True)
    in_order = step.gather(1, order)
    taken = in_order.cumsum(1) - in_order / 2 <= total.abs()
    chosen = torch.zeros_like(possible).scatter(1, order, taken) & possible
    bits = BITS[rounded.dtype]
    return torch.where(chosen, others.view(bits), rounded.view(bits)).view(rounded.dtype)


def _neighbours(x: Tensor, direction: Tensor) -> Tensor:
    """The next values up (1), down (-1), or the same (0)."""
    bits = BITS[x.dtype]
    sign = torch.iinfo(bits).min
    ordered = x.view(bits).int()
    ordered = torch.where(ordered < 0, sign - ordered, ordered) + direction.int()
    return torch.where(ordered < 0, sign - ordered, ordered).to(bits).view(x.dtype)
