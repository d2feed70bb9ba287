"""Argument checks: every error names the argument, what it was and what was expected, before anything is launched."""

import math
from collections.abc import Iterable
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_STEP = 2**28


def tensor(name: str, value: Any, dtypes: Iterable[torch.dtype] | None = None, min_dim: int = 0) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in tuple(dtypes):
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() < min_dim:
        raise ValueError(f"{name}: expected at least {min_dim} dimensions, got shape {tuple(value.shape)}")
    return value


def packed(name: str, value: Any, min_dim: int = 2) -> Tensor:
    return tensor(name, value, (torch.uint8,), min_dim)


def floating(name: str, value: Any, min_dim: int = 0) -> Tensor:
    return tensor(name, value, FLOAT_DTYPES, min_dim)


def shape(name: str, value: Tensor, expected: Iterable[int], meaning: str = "") -> None:
    expected = tuple(expected)
    if tuple(value.shape) != expected:
        why = f" ({meaning})" if meaning else ""
        raise ValueError(f"{name}: expected shape {expected}{why}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected on {other.device} like {other_name}, got {value.device}")


def packs(name: str, value: Any, logits_name: str, logits: Tensor) -> Tensor:
    """`value` must be the packed tensor of bits shaped like `logits` (B, ..., C), on the same device."""
    packed(name, value)
    same_device(name, value, logits_name, logits)
    channels = logits.shape[-1]
    meaning = f"the packed bits of {logits_name} {tuple(logits.shape)}"
    shape(name, value, (*logits.shape[:-1], (channels + 7) // 8), meaning)
    return value


def option(name: str, value: Any, choices: Iterable[str]) -> str:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    return str(value)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An int in low..high (both included)."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a dynamic size under torch.compile
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")) or isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    value = value if isinstance(value, int) else index(value)  # torch.compile traces neither hasattr nor index of its symbols
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} <= {name} <= {high}, got {value}")
    return value


def positive(name: str, value: Any) -> float:
    value = real(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected > 0, got {value}")
    return value


def real(name: str, value: Any) -> float:
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def dimension(name: str, value: Any, num_dims: int) -> int:
    """A dimension index normalised to 0..num_dims - 1."""
    return integer(name, value, -num_dims, num_dims - 1) % num_dims


def _device_number(name: str, value: Tensor, dtype: torch.dtype, like_name: str, like: Tensor) -> Tensor:
    tensor(name, value, (dtype,))
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    same_device(name, value, like_name, like)
    return value


def seed(value: Any, like_name: str, like: Tensor) -> tuple[int, Tensor | None]:
    """A 64-bit seed as (int64 value, device tensor or None): the kernel takes the tensor if there is one."""
    if isinstance(value, Tensor):
        return 0, _device_number("seed", value, torch.int64, like_name, like)
    value = integer("seed", value, -(2**63), 2**64 - 1)
    return value - 2**64 if value >= 2**63 else value, None


def step(value: Any, like_name: str, like: Tensor) -> tuple[int, Tensor | None]:
    if isinstance(value, Tensor):
        return 0, _device_number("step", value, torch.int64, like_name, like)
    return integer("step", value, 0, MAX_STEP - 1), None


def sample_offset(value: Any) -> int:
    return integer("sample_offset", value, 0, 2**62)


def sample_offset_or_tensor(value: Any, like_name: str, like: Tensor) -> tuple[int, Tensor | None]:
    if isinstance(value, Tensor):
        return 0, _device_number("sample_offset", value, torch.int64, like_name, like)
    return sample_offset(value), None


def guidance_scale(value: Any, like_name: str, like: Tensor) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        return 1.0, _device_number("guidance_scale", value, torch.float32, like_name, like)
    return real("guidance_scale", value), None


def out(value: Tensor | None, expected: Iterable[int], dtype: torch.dtype, like_name: str, like: Tensor) -> None:
    """A caller's output: right shape and dtype, contiguous, on the right device."""
    if value is None:
        return
    tensor("out", value, (dtype,))
    shape("out", value, expected)
    same_device("out", value, like_name, like)
    if not value.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {value.stride()}")
