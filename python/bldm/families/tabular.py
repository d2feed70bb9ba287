"""vkinakh/binary-diffusion-tabular: `BinaryDiffusion1D`, which thresholds and then adds noise anew (XOR rule)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

import bldm_kernels as bk

from ..sampling import Call, Conventions, FastSampler, Output, chunk, decided_at
from ..sampling.outputs import logits
from .base import Accelerated, fresh_seed, has, schedule_from, takes

STRATEGIES = ("target", "mask", "half-half")


class WithModel(nn.Module):
    """`model_fn(x, t, y=..., model=model)` as a module, so that the device and the mode of the model are known."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        return self.function(x, time, y=y, model=self.model)


def _identity(function: Any) -> Any:
    """What two equal functions share: a `partial` made anew for every call is the same function again."""
    if isinstance(function, partial):
        return (_identity(function.func), function.args, tuple(sorted(function.keywords.items())))
    return function


class AcceleratedTabular(Accelerated):
    """`sample` as the original; bits float32 (n, D)."""

    @staticmethod
    def recognises(model: object) -> bool:
        fits = has(model, "betas", "target", "n_timesteps", "size", "model")
        return fits and takes(model.sample, "model_fn", "y", "n", "timesteps", "threshold", "strategy")  # type: ignore

    def _make(self, model_fn: Callable[..., Tensor] | None, threshold: float, strategy: str) -> FastSampler:
        two_way, half = self.model.target == "two_way", self.model.n_timesteps // 2
        target, mask = (
            Output(prediction, decided_at(chunk(i) if two_way else logits, threshold))
            for i, prediction in enumerate(("x_0", "flip"))
        )

        def output_at(t: int) -> Output:
            chosen = strategy if two_way else self.model.target
            return mask if chosen == "mask" or (chosen == "half-half" and t - 1 < half) else target

        conventions = Conventions(
            output_at=output_at,
            rule="threshold-renoise",
            time_label="t-1",
            state="bits",
            layout="flat",
            call=Call(("x", "time"), {"y": "cond"}, pass_none=True),
        )
        denoiser = self.model.model if model_fn is None else WithModel(self.model.model, model_fn)
        schedule = schedule_from(1 - 2 * self.model.betas.double())  # betas are flip rates
        return FastSampler(denoiser, schedule, latent_shape=(1, self.model.size), conventions=conventions, **self.options)

    def sample(
        self,
        *,
        model_fn: Callable[..., Tensor] | None = None,
        y: Tensor | None = None,
        n: int,
        timesteps: Iterable[int] | None = None,
        threshold: float = 0.5,
        strategy: str = "target",
    ) -> Tensor:
        """Bits float32 (n, D).

        model_fn: called as model_fn(x, t, y=y, model=model), for guidance. y: (n, ...). timesteps: ascending, counted from 0.
        threshold: in (0, 1). strategy: "target", "mask" or "half-half" of a two-way model; others have nothing to choose.
        """
        bk.checks.option("strategy", strategy, STRATEGIES)
        if not 0 < bk.checks.real("threshold", threshold) < 1:
            raise ValueError(f"threshold: expected between 0 and 1, got {threshold}")
        chosen = range(self.model.n_timesteps) if timesteps is None else [int(t) for t in timesteps]
        key = (_identity(model_fn), threshold, strategy)
        sampler = self._sampler(key, lambda: self._make(model_fn, threshold, strategy))
        packed = sampler.sample(n, timesteps=[t + 1 for t in reversed(chosen)], seed=fresh_seed(), cond=y)
        return bk.unpack_bits(packed, self.model.size).flatten(1)
