"""What a denoiser is told about the time: a label maps the timestep t (1..T) to the number it was trained with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TimeLabel = Callable[[int], int | float]

TIME_LABELS: dict[str, TimeLabel] = {"t": lambda t: t, "t-1": lambda t: t - 1}


def original(timestep_map: Sequence[int]) -> TimeLabel:
    """A respaced process tells the denoiser the index of the process it was trained on: t stands for timestep_map[t - 1]."""
    return lambda t: int(timestep_map[t - 1])


def rescaled(label: TimeLabel, factor: float) -> TimeLabel:
    """A label in other units, as a float32 (guided diffusion's rescale_timesteps: factor 1000 / T)."""
    # float32 arithmetic, as where the label is a tensor that is multiplied
    return lambda t: float(torch.tensor(float(label(t))) * factor)


def label_table(label: TimeLabel, timesteps: Sequence[int]) -> Tensor:
    """(S,) int64 or float32: the label of every step."""
    values = [label(t) for t in timesteps]
    return torch.tensor(values, dtype=torch.int64 if all(isinstance(value, int) for value in values) else torch.float32)
