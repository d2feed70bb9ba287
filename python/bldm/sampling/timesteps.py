"""Which timesteps the reverse process visits: a spacing maps (T, S) to descending timesteps in 1..T.

Code that counts its timesteps from 0 calls t - 1 what is t here: x_t with t = 0 is clean, whatever the code base.
"""

from collections.abc import Callable

import numpy as np

import bldm_kernels as bk

Spacing = Callable[[int, int], list[int]]


def reference(num_timesteps: int, num_steps: int) -> list[int]:
    """As `BernoulliSchedule.timesteps`: 1 + int(linspace(0, 1, S) (T - 1)), one step starting at T."""
    return bk.BernoulliSchedule("linear", num_timesteps).timesteps(num_steps)


def paper(num_timesteps: int, num_steps: int) -> list[int]:
    """The paper's own spacing to the letter: as `reference`, but a single step is the one from t = 1."""
    return [1] if num_steps == 1 else reference(num_timesteps, num_steps)


def ddim_uniform(num_timesteps: int, num_steps: int) -> list[int]:
    """Every n-th timestep from 1 on (Song et al. 2021, "uniform"); raises ValueError if no stride n gives S of them."""
    counts = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if num_steps not in counts:
        near = sorted(counts, key=lambda count: abs(count - num_steps))[:2]
        raise ValueError(f"steps: no stride through {num_timesteps} timesteps takes {num_steps} steps (near: {sorted(near)})")
    return [t + 1 for t in range(0, num_timesteps, counts[num_steps])][::-1]


def quadratic(num_timesteps: int, num_steps: int) -> list[int]:
    """Squares of linspace(0, sqrt(0.8 T), S) (Song et al. 2021, "quadratic"); those that coincide are taken once."""
    squares = np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2
    return sorted({int(t) + 1 for t in squares}, reverse=True)


SPACINGS: dict[str, Spacing] = {
    "reference": reference,
    "paper": paper,
    "ddim-uniform": ddim_uniform,
    "quadratic": quadratic,
}
