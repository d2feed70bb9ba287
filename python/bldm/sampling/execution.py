"""How the denoiser runs: its own precision or autocast, as it is or compiled; never with dropout."""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# Modules whose only use of their weight is a product that autocast runs in its lower precision.
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def device_of(denoiser: object) -> torch.device:
    """Where a module's parameters or buffers are; the CPU for anything else."""
    if isinstance(denoiser, nn.Module):
        for part in denoiser.modules():  # the first tensor is soon found; `parameters()` would look for one everywhere
            for value in chain(part._parameters.values(), part._buffers.values()):
                if value is not None:
                    return value.device
    return torch.device("cpu")


class Anatomy:
    """A module's parts, parameters and buffers, listed once: walking through a large module takes longer than a step.

    Every call asks about hundreds of them before anything starts, hence `map`.
    """

    def __init__(self, denoiser: object):
        self.parts = list(denoiser.modules()) if isinstance(denoiser, nn.Module) else []
        entries: list[tuple[dict[str, Any], str, object]] = [
            (table, name, value)
            for part in self.parts
            for table in (part._modules, part._parameters, part._buffers)
            for name, value in table.items()  # type: ignore[attr-defined]
            if value is not None
        ]
        self._tables, self._names = [table for table, _, _ in entries], [name for _, name, _ in entries]
        self._values = [value for _, _, value in entries]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]

    def intact(self) -> bool:
        """Whether all of them are still where they were."""
        return all(map(operator.is_, map(dict.get, self._tables, self._names), self._values))

    def addresses(self) -> tuple[int, ...]:
        return tuple(map(Tensor.data_ptr, self._tensors))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off; afterwards every part is back in the mode it was in."""
        training = [part for part in self.parts if part.training]
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True


class LowPrecisionCopy:
    """A module that shares everything with the original but the weights of its products, which it holds in `dtype`.

    Compiled code under autocast would convert all weights anew at every call. The copies follow the originals: `refresh`
    copies those that have changed, in place, so that compiled code and captured graphs stay valid.
    """

    def __init__(self, original: nn.Module, dtype: torch.dtype):
        shared = {id(tensor): tensor for tensor in chain(original.parameters(), original.buffers())}
        self.module = copy.deepcopy(original, shared).eval()
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for source, part in zip(original.modules(), self.module.modules(), strict=True):
            if type(source) in PRODUCTS:
                for name, parameter in source.named_parameters(recurse=False):
                    if parameter.dtype == torch.float32:
                        low = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                        setattr(part, name, low)
                        self._pairs.append((parameter, low))
        self._versions = self._current()

    def _current(self) -> list[int]:
        return [-1 if source.is_inference() else source._version for source, _ in self._pairs]

    def refresh(self) -> None:
        current = self._current()
        for (source, low), now, then in zip(self._pairs, current, self._versions, strict=True):
            if now != then:
                low.data.copy_(source)
        self._versions = current


class Execution:
    """A denoiser ready to be called: `denoise` within `context()`.

    Args:
        autocast: dtype to run the denoiser in, or None for its own.
        compile: True, or options of torch.compile (each batch size is compiled for itself).
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        device: torch.device,
        autocast: torch.dtype | None,
        compile: bool | Mapping[str, Any],
    ):
        self.original, self.device, self.autocast, self.compiled = denoiser, device, autocast, bool(compile)
        self.anatomy = Anatomy(denoiser)
        self._copy: LowPrecisionCopy | None = None
        self.denoise = denoiser
        if compile:
            if autocast is not None and isinstance(denoiser, nn.Module):
                self._copy = LowPrecisionCopy(denoiser, autocast)
                self.denoise = self._copy.module
            options = dict(compile) if isinstance(compile, Mapping) else {}
            self.denoise = torch.compile(self.denoise, **{"dynamic": False, **options})

    def serves(self, denoiser: object, device: torch.device) -> bool:
        """Whether this is still how to run `denoiser` on `device`; if so, changes of its weights are followed."""
        if self.original is not denoiser or self.device != device or not self.anatomy.intact():
            return False
        if self._copy is not None:
            self._copy.refresh()
        return True

    @contextmanager
    def context(self) -> Iterator[None]:
        """Around the whole loop rather than each call: autocast then converts a weight once a run, not once a step."""
        with ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            if self.compiled and self.device.type == "cuda":
                # Constants that the denoiser makes on the CPU and moves are made on the device: compiled, they would be
                # copied at every call, which waits for the device and cannot be captured.
                stack.enter_context(self.device)
            yield
