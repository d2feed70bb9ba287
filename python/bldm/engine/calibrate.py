"""What an engine of e4m3 products learns from a short run of the float model: how large activations get, for their scales, and of
its logits how much e4m3 leaves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference.attention import E4M3_MAX

from ..denoiser import BinaryDenoiser, Block
from ..sampling import FastSampler
from ..sampling.execution import Anatomy
from .blocks import Scales

SAMPLES, STEPS = 16, 8
# The largest value seen is stored as 448 / 2: a float that is halved loses nothing, one beyond the largest is cut off.
MARGIN = 2.0


class Call(NamedTuple):
    """Of the float model: x_t (B, ..., P), t (B,), labels or None, and its logits."""

    x_t: Tensor
    t: Tensor
    label: Tensor | None
    logits: Tensor


class Calibration(NamedTuple):
    """scales: float32 (1,), of the input of every product of every block; calls: what they were found in."""

    scales: list[Scales]
    calls: list[Call]


def calibrate(
    model: BinaryDenoiser, schedule: bk.BernoulliSchedule, prediction: str, latents: Tensor | None, cond: Tensor | None
) -> Calibration:
    """Runs the model, without its dropout.

    Args:
        model: in float32.
        schedule, prediction: what it was trained with.
        latents: packed x_0 (B, ..., P) of real data, which are noised to timesteps all over the schedule; None: a sampling run.
        cond: their conditions, or those of the run; None: classes in turn, one of four samples without, or no text.
    """
    count = SAMPLES if latents is None else len(latents)
    if cond is None and model.num_classes is not None:
        assert model.null_label is not None
        turns = torch.arange(count, device=model.positions.device)
        cond = torch.where(turns % 4 == 3, model.null_label, turns % model.num_classes)
    with Anatomy(model).evaluating(), recorded(model) as calls, observed(model) as largest, torch.no_grad():
        if latents is None:
            sampler = FastSampler(
                model, schedule, latent_shape=(model.num_positions, model.num_bits), prediction=prediction, graph=False
            )
            sampler.sample(count, min(STEPS, schedule.num_steps), cond=cond)
        else:
            bk.checks.packed("calibration", latents, min_dim=3)
            t = torch.linspace(1, schedule.num_steps, count, device=latents.device).round().long()
            flip = schedule.flip.to(latents.device)[t].float()
            model(bk.add_noise(latents, flip, seed=0, num_bits=model.num_bits), t, cond)
    scales = [{name: (MARGIN / E4M3_MAX * value).clamp(min=1e-30) for name, value in block.items()} for block in largest]
    return Calibration(scales, calls)


def gain(engine: Callable[..., Tensor], calls: Sequence[Call]) -> Tensor:
    """What the engine's logits are to be multiplied by, float64 (), so that as much of the model's is in them as in the model's.

    What softmax and norms make of values with noise is a little shorter than of those without (what is lost in a product of
    rounded values, its scale makes up for: rounding.py). It adds up to about 1%, for which samples look less like their class.
    Here the mean of <model, model> / <model, engine> over the calls, so that late steps with their large logits count no more
    than early ones; 1 where the engine has less than half of the model's.
    """
    ratios = []
    for x_t, t, label, logits in calls:
        model, found = logits.double(), engine(x_t, t, label).double()
        whole, common = model.square().sum(), (model * found).sum()
        ratios.append(torch.where(common > whole / 2, whole / common, 1.0))
    return torch.stack(ratios).mean()


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of the model so far."""
    calls: list[Call] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], logits: Tensor) -> None:
        x_t, t, label = (*arguments, named.get("label"))[:3]
        calls.append(Call(x_t.clone(), t.clone(), label, logits))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def observed(model: BinaryDenoiser) -> Iterator[list[Scales]]:
    """The largest absolute input (1,) so far of every product of every block, without the norm's weights, which are folded in;
    and, as "... stream", that of the norms."""
    largest: list[Scales] = [{} for _ in model.blocks]

    def watch(module: nn.Module, seen: Scales, name: str) -> Callable[[], None]:
        def note(name: str, x: Tensor) -> None:
            largest = x.abs().amax().reshape(1)
            seen[name] = torch.maximum(seen.get(name, largest), largest)

        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].float()
            if isinstance(module, nn.LayerNorm):
                note(f"{name} stream", x)
                x = F.layer_norm(x, x.shape[-1:], eps=module.eps)
            note(name, x)

        return module.register_forward_pre_hook(look).remove

    with ExitStack() as stack:
        for block, seen in zip(model.blocks, largest, strict=True):
            assert isinstance(block, Block)
            watched = {"qkv": block.norm1, "proj": block.proj, "expand": block.norm2, "contract": block.mlp[2]}
            if block.cross is not None:
                watched |= {"query": block.norm_cross, "mix": block.cross.proj}
            for name, module in watched.items():
                stack.callback(watch(module, seen, name))
        yield largest
