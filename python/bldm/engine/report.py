"""What runs the parts of an engine."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of an engine: its name, the shape of its input for one sample, and what runs it.

    `runs` is "kernel": one of ours, or cuBLASLt where that is faster; "PyTorch" where those do not take the shape or the device;
    or the function of PyTorch that is meant to run it.
    """

    name: str
    shape: tuple[int, ...]
    runs: str

    @classmethod
    def of(cls, name: str, shape: Sequence[int], supported: bool) -> "Part":
        return cls(name, tuple(shape), "kernel" if supported else "PyTorch")


def warn_of_fallbacks(parts: Sequence[Part]) -> None:
    """One warning for all parts that fall back to PyTorch."""
    slow = ", ".join(f"{part.name} {part.shape}" for part in parts if part.runs == "PyTorch")
    if slow:
        warnings.warn(f"optimize: no kernel takes {slow}: PyTorch runs them, more slowly (see `report`)", stacklevel=5)
