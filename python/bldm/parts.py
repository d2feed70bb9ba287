"""Named parts of a model, for `bldm profile`: ranges of torch's profiler while it looks on, nothing otherwise."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

PREFIX = "bldm: "  # of the ranges' names in the profiler's events
# The part we are in, "" outside of all; None: nobody looks on (so also in every thread but the one that is being profiled).
_NOTHING = nullcontext()
_path: ContextVar[str | None] = ContextVar("path", default=None)


def part(name: str) -> AbstractContextManager[None]:
    """What runs inside counts as the part `name`. Parts nest: "attention" inside "block 3" is "block 3/attention".

    A number after a space ("block 3") marks one of many alike, which a table may fold into one line. Outside of a profile, and
    in compiled code, this is an empty context.
    """
    if torch.compiler.is_compiling() or _path.get() is None:
        return _NOTHING
    return _part(name)


@contextmanager
def _part(name: str) -> Iterator[None]:
    outer = _path.get()
    path = f"{outer}/{name}" if outer else name
    token = _path.set(path)
    try:
        # 2 us a range, where torch.profiler.record_function takes 18: as long as many an operator on a CPU
        with torch._C._profiler._RecordFunctionFast(PREFIX + path):
            yield
    finally:
        _path.reset(token)


@contextmanager
def recording() -> Iterator[None]:
    """Parts are ranges within, in this thread."""
    token = _path.set("")
    try:
        yield
    finally:
        _path.reset(token)
