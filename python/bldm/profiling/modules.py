"""Parts of a module that marks none itself: its tree of named children."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..parts import part


def named_parts(module: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, child, depth left below it) of the children that are called; of a list of modules, its members instead.

    A numbered child is "ClassName i"; one inside of a list "list/ClassName i".
    """
    for key, child in module.named_children():
        name = f"{type(child).__name__} {key}" if key.isdecimal() else key
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for inner, grandchild, left in named_parts(child, depth):
                yield f"{name}/{inner}", grandchild, left
        else:
            yield name, child, depth - 1


@contextmanager
def children_as_parts(module: nn.Module, depth: int) -> Iterator[None]:
    """While it lasts, every call of a child counts as a part, and of its children, `depth` levels down."""
    handles: list[Any] = []
    try:
        _hook(module, depth, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, depth: int, handles: list[Any]) -> None:
    if depth > 0:
        for name, child, left in named_parts(module, depth):
            handles.extend(_enter_and_leave(name, child))
            _hook(child, left, handles)


def _enter_and_leave(name: str, child: nn.Module) -> Iterator[Any]:
    running: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        running.append(part(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    yield child.register_forward_pre_hook(enter, prepend=True)
    yield child.register_forward_hook(leave, always_call=True)
