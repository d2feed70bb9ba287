"""How a denoiser is called: which of state, time and condition goes where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .conditions import Condition

Caller = Callable[[Callable[..., Any], Tensor, Tensor, Condition], Any]
ROLES = ("x", "time", "cond")


@dataclass(frozen=True)
class Call:
    """A denoiser's signature: `Call(("x", "cond"), {"time_steps": "time"})` calls denoiser(x, cond, time_steps=time).

    Args:
        positional: roles ("x", "time", "cond") of the positional arguments, in order.
        keywords: keyword -> role.
        pass_none: pass the condition even where there is none (as None) instead of leaving it out.

    A condition that is a mapping of names to tensors is passed as keywords, wherever "cond" stands.
    """

    positional: tuple[str, ...] = ROLES
    keywords: Mapping[str, str] = field(default_factory=dict)
    pass_none: bool = False

    def __post_init__(self) -> None:
        roles = [*self.positional, *self.keywords.values()]
        if sorted(set(roles)) != sorted(roles) or not {"x", "time"} <= set(roles) <= set(ROLES):
            raise ValueError(f"call: expected the roles 'x', 'time' and perhaps 'cond', each once, got {roles}")

    def __call__(self, denoiser: Callable[..., Any], x: Tensor, time: Tensor, cond: Condition) -> Any:
        values = {"x": x, "time": time, "cond": cond}
        named = cond if isinstance(cond, Mapping) else {}
        if isinstance(cond, Mapping) or (cond is None and not self.pass_none):
            del values["cond"]
        arguments = [values[role] for role in self.positional if role in values]
        return denoiser(*arguments, **{name: values[role] for name, role in self.keywords.items() if role in values}, **named)
