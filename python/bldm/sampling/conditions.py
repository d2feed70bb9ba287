"""What a denoiser is conditioned on: nothing, one tensor, or named tensors, one row a sample."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import bldm_kernels as bk

Condition = None | Tensor | Mapping[str, Tensor]


def each(function: Callable[..., Tensor], cond: Condition, *others: Condition) -> Condition:
    """Apply a function to every tensor of a condition (and the tensors of the same name of others like it)."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: function(value, *(other[name] for other in others)) for name, value in cond.items()}  # type: ignore
    return function(cond, *others)


def check(cond: object, num_samples: int, device: torch.device, name: str = "cond") -> Condition:
    """A condition of `num_samples` rows on `device`, from an int, a 0-dimensional tensor (for all), a tensor, or a mapping."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {key: check(value, num_samples, device, f"{name}[{key!r}]") for key, value in cond.items()}  # type: ignore
    if not isinstance(cond, Tensor):
        cond = torch.tensor(bk.checks.integer(name, cond, 0, 2**63 - 1))
    cond = cond.to(device)
    if cond.dim() == 0:
        return cond.expand(num_samples)
    if cond.shape[0] != num_samples:
        raise ValueError(f"{name}: expected {num_samples} conditions, one a sample, got shape {tuple(cond.shape)}")
    return cond


def check_null(null: object, cond: Condition, device: torch.device) -> Condition:
    """The condition that means "none", in the shape of `cond`: an int, one row for all, or one row a sample."""
    if isinstance(cond, Mapping):
        if not isinstance(null, Mapping) or null.keys() != cond.keys():
            raise ValueError(f"null_cond: expected a mapping with the names {sorted(cond)} like cond, got {null!r}")
        return {key: check_null(null[key], value, device) for key, value in cond.items()}  # type: ignore[misc]
    assert isinstance(cond, Tensor)
    value = torch.as_tensor(null, device=device).to(cond.dtype)
    try:
        return value.expand_as(cond)
    except RuntimeError:
        raise ValueError(
            f"null_cond: expected a shape that expands to cond's {tuple(cond.shape)}, got {tuple(value.shape)}"
        ) from None


def signature(cond: Condition) -> object:
    """What a captured graph depends on: names, shapes and dtypes, not values."""
    if isinstance(cond, Mapping):
        return tuple((name, signature(value)) for name, value in cond.items())
    return None if cond is None else (tuple(cond.shape[1:]), cond.dtype)
