"""What must hold before anything is timed: each check takes a result and raises WrongResult."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

Check = Callable[[Any], None]
CHUNK_BITS = 2**22  # of the reference and of float64 sums at a time, to bound their memory


class WrongResult(Exception):
    """A provider computes something else than the op; its time would mean nothing."""


def poison(out: Tensor) -> None:
    """What a kernel leaves unwritten must not look like a result."""
    out.fill_(0xA5 if out.dtype == torch.uint8 else float("nan"))


def by_samples(function: Callable[[slice], Tensor], num_samples: int, sample_bits: int) -> Tensor:
    """The reference's result, a few samples at a time (which changes no bit: docs/random-stream.md)."""
    chunk = max(1, CHUNK_BITS // sample_bits)
    with bk.use_backend("torch"):
        return torch.cat([function(slice(i, min(i + chunk, num_samples))) for i in range(0, num_samples, chunk)])


def exact(expected: Tensor) -> Check:
    def check(out: Tensor) -> None:
        if out.shape != expected.shape:
            raise WrongResult(f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
        if wrong := int((out != expected).sum()):
            raise WrongResult(f"{wrong} of {expected.numel()} elements differ from the reference")

    return check


def close(expected: Tensor, tolerance: float) -> Check:
    """|out - expected| / |expected| in float64; NaN never passes."""

    def check(out: Tensor) -> None:
        if out.shape != expected.shape:
            raise WrongResult(f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
        error = ((out.double() - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            raise WrongResult(f"relative error {error:.1e}, at most {tolerance:.0e} expected")

    return check


def rate(changed: Callable[[Tensor], Tensor], probability: Callable[[slice], Tensor], num_samples: int) -> Check:
    """The number of set bits in changed(out) lies within 5 standard deviations of its mean; probability(samples) in float64."""

    def check(out: Tensor) -> None:
        mean = variance = 0.0
        samples = max(1, CHUNK_BITS // out[0].numel())
        for i in range(0, num_samples, samples):
            p = probability(slice(i, i + samples))
            mean, variance = mean + p.sum().item(), variance + (p * (1 - p)).sum().item()
        found = changed(out).sum(dtype=torch.float64).item()
        if not abs(found - mean) <= 5 * variance**0.5:
            raise WrongResult(f"{found:.0f} bits set, expected {mean:.0f} +- {variance**0.5:.0f}")

    return check


def nearest(queries: Tensor, database: Tensor, k: int) -> Check:
    """Every distance is that of its index, in order without repeats; the first and the last query as the reference has them."""
    some = queries[:: max(1, len(queries) - 1)]
    with bk.use_backend("torch"):
        expected = bk.hamming_topk(some, database, k)

    def check(out: tuple[Tensor, Tensor]) -> None:
        distances, indices = out
        exact(expected[0])(distances[:: max(1, len(queries) - 1)])
        exact(expected[1])(indices[:: max(1, len(queries) - 1)])
        if not bool(((indices >= 0) & (indices < len(database))).all()):
            raise WrongResult("indices outside the database")
        ordered = (distances.long() * len(database) + indices).diff(dim=1)
        if not bool((ordered > 0).all()):
            raise WrongResult("not in order of distance and index")
        with bk.use_backend("torch"):
            found = database[indices.flatten()]
            again = bk.hamming_distance(queries.repeat_interleave(k, 0), found).view_as(distances)
        exact(again)(distances)

    return check
