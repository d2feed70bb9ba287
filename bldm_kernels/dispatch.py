"""Which implementation of an op runs: by device, by availability, or by force.

A backend is a name and a table of kernels, one per op, all with the same canonical signature (see `_ops.py`). Order of
preference on a GPU: cuda (ahead of time), triton (just in time), torch (the reference); on a CPU: cpu (C++), torch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch")
_PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}


@dataclass
class Backend:
    """One implementation of the ops.

    unavailable: why it cannot be used here, or None. devices: device types it runs on. kernels: op name -> function.
    details: what `bldm doctor` prints about it. float64: whether its kernels take float64 logits (only the reference).
    """

    name: str
    devices: tuple[str, ...] = ()
    unavailable: str | None = None
    kernels: dict[str, Callable[..., None]] = field(default_factory=dict)
    details: str = ""
    float64: bool = False


_registry: dict[str, Backend] = {}
_forced: str | None = None


def register_backend(backend: Backend) -> None:
    _registry[backend.name] = backend


def backends() -> dict[str, Backend]:
    """Every backend by name, in order of preference: what it offers, or why it is missing (`.unavailable`)."""
    return {name: _registry[name] for name in BACKENDS}


def _check_available(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    backend = _registry[name]
    if backend.unavailable is not None:
        raise RuntimeError(f"backend {name!r} is not available: {backend.unavailable}")
    return backend


class use_backend:
    """Force one backend for every op: as a function (`use_backend("triton")`) or a context manager.

    None returns to choosing by device. Raises ValueError for an unknown name and RuntimeError, with the reason, for a
    backend that is not available. The setting is the process's, not the thread's.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None:
            _check_available(name)
        self._previous = _forced
        _forced = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _forced
        _forced = self._previous


def forced_backend() -> str | None:
    """The name that `use_backend` or the environment forces, or None."""
    return _forced


def force_from_environment() -> None:
    """BLDM_BACKEND=name forces a backend; called once, when every backend has been registered."""
    name = os.environ.get("BLDM_BACKEND")
    if name:
        use_backend(name)


def select(op: str, device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., None]:
    """The kernel of `op` to run on `device`; float64 runs on the reference unless a backend is forced."""
    if _forced is not None:
        backend = _registry[_forced]
        if device.type not in backend.devices and _forced != "torch":
            raise RuntimeError(f"{op}: backend {_forced!r} is forced, but it does not run on {device.type} tensors")
        if dtype == torch.float64 and not backend.float64:
            raise TypeError(f"{op}: backend {_forced!r} is forced, but it has no float64 kernels (use 'torch')")
        if op not in backend.kernels:
            raise RuntimeError(f"{op}: backend {_forced!r} is forced, but it has no kernel for this op")
        return backend.kernels[op]
    for name in _PREFERENCE.get(device.type, ()):
        backend = _registry[name]
        usable = backend.unavailable is None and device.type in backend.devices
        if usable and op in backend.kernels and (backend.float64 or dtype != torch.float64):
            return backend.kernels[op]
    return _registry["torch"].kernels[op]
