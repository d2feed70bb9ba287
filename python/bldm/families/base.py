"""What all accelerated objects share."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

from ..sampling import FastSampler


def takes(function: object, *names: str) -> bool:
    """Whether `function` is callable and has parameters of these names."""
    return callable(function) and set(names) <= set(signature(function).parameters)


def has(model: object, *names: str) -> bool:
    return all(hasattr(model, name) for name in names)


class Accelerated:
    """A live object of another code base whose sampling runs on `FastSampler`; everything else is the object's own.

    Draws follow torch's default generator: torch.manual_seed makes them repeatable, as it does for the original.
    """

    SAMPLERS = 4  # kept at a time, one for each set of conventions that the calls ask for

    def __init__(self, model: Any, **options: Any):
        self.model, self.options = model, options
        self._samplers: OrderedDict[Hashable, FastSampler] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet: while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def samplers(self) -> list[FastSampler]:
        """The `FastSampler`s in use, for their `graphs` and `graph_bytes`."""
        return list(self._samplers.values())

    def _sampler(self, key: Hashable, make: Callable[[], FastSampler]) -> FastSampler:
        if key not in self._samplers:
            while len(self._samplers) >= self.SAMPLERS:
                self._samplers.popitem(last=False)
            self._samplers[key] = make()
        self._samplers.move_to_end(key)
        return self._samplers[key]


def fresh_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


def schedule_from(*keep: Tensor) -> bk.BernoulliSchedule:
    """A schedule from a code base's own table of kept signal for t = 1..T, with k_0 = 1 put in front, in float64."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), *(k.detach().cpu().double() for k in keep)])
    return bk.BernoulliSchedule.from_keep(table.clamp(0, 1))


def check_bits(name: str, value: Tensor) -> Tensor:
    """A mask or latent of zeros and ones."""
    bk.checks.tensor(name, value)
    if not bool(((value == 0) | (value == 1)).all()):
        raise ValueError(f"{name}: expected zeros and ones only, got other values")
    return value


def keep_arguments(mask: dict[str, Tensor] | None, shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """{"mask", "latent"} of the paper's code, for all samples and broadcast to `shape` -> keep_mask and keep_bits."""
    if mask is None:
        return {}
    missing = {"mask", "latent"} - set(mask)
    if missing:
        raise ValueError(f"mask: expected 'mask' and 'latent', got no {sorted(missing)[0]!r}")
    packed = {}
    for name, key in (("keep_mask", "mask"), ("keep_bits", "latent")):
        value = check_bits(f"mask[{key!r}]", mask[key])
        try:
            packed[name] = bk.pack_bits(value.expand(shape).reshape(latent_shape))
        except RuntimeError:
            got = tuple(value.shape)
            raise ValueError(f"mask[{key!r}]: expected shape {shape}, or one that expands to it, got {got}") from None
    return packed
