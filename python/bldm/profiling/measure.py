"""How a profile is taken: the call timed as it runs, the same call under the profiler, and without its graph to tell parts."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

from ..engine import DenoiserEngine
from ..families import Accelerated
from ..painter import Painter
from ..sampling import FastSampler
from .modules import children_as_parts
from .recording import Recording, parts_by_order, record, synchronize
from .result import STEP, Phase, Profile, make_phase

WARM_UP = 2
# The sampling loop's and the decoding's own parts. A model that marks others needs no hooks.
COMMON = {"begin", "state", "denoiser", "flip", "hook", "embed", "decoder"}
ENOUGH = 0.9  # share of a graph's kernels that must be found again to say which part is which


@torch.no_grad()
def profile(
    target: Any,
    *,
    num_samples: int = 1,
    steps: int = 16,
    cond: int | Tensor | None = None,
    guidance_scale: float = 1.0,
    call: Callable[[Any], Any] | None = None,
    repeats: int = 3,
    depth: int = 4,
    **options: Any,
) -> Profile:
    """Measure where the time of sampling (and of decoding, for a whole model) goes, on the device where the model is.

    Every phase is timed as it really runs, host to host: the median of `repeats` after two warm-up calls. As many calls are then
    recorded by torch's profiler, of which the median one is told part by part. What a CUDA graph runs is told apart by the
    order of its kernels, which is that of the same call without the graph. Parts are those that the model marks
    (`bldm.parts.part`); a denoiser or decoder that marks none has its tree of modules instead.

    Args:
        target: a `BinaryLatentDiffusion` or its engine (sampling and decoding), a `FastSampler`, what `bldm.accelerate` returns.
        num_samples, steps, cond, guidance_scale: of the call, as in `FastSampler.sample`; `cond` is by default every class in
            turn, for a model with classes.
        call: samples once, given the target, instead of these arguments; needed for an accelerated object, whose methods have
            signatures of their own.
        repeats: >= 1.
        depth: >= 1, levels of modules, for models without marks.
        options: of the model's sampler, for example autocast=torch.bfloat16 (the decoder runs under it too) or compile=True.

    Returns: a `Profile`; its `rows`, phase by phase, add up to the measured times.

    Raises: TypeError, ValueError naming the argument.
    """
    num_samples = bk.checks.integer("num_samples", num_samples, 1, 2**40)
    repeats = bk.checks.integer("repeats", repeats, 1, 10**6)
    depth = bk.checks.integer("depth", depth, 1, 10**6)
    if call is not None and not callable(call):
        raise TypeError(f"call: expected a function of the target, got {type(call).__name__}")
    if isinstance(target, Accelerated) and call is None:
        raise ValueError("call: an accelerated object samples with a signature of its own; expected a function, got None")
    model = target if isinstance(target, Painter) else None
    if model is None and not isinstance(target, (FastSampler, Accelerated)):
        raise TypeError(
            "target: expected a BinaryLatentDiffusion, its engine, a FastSampler or what bldm.accelerate returns, "
            f"got {type(target).__name__}"
        )
    if call is not None and model is not None:
        raise ValueError("call: a whole model is sampled as num_samples, steps and so on say; expected None")
    if options and model is None:
        raise ValueError(f"{', '.join(options)}: options of a model's sampler, but the target is no whole model")
    sampler = target if model is None else model.sampler(**options)
    if model is not None and cond is None and model.denoiser.num_classes is not None:
        cond = torch.arange(num_samples) % model.denoiser.num_classes

    def sample() -> Any:
        if call is not None:
            return call(sampler)
        return sampler.sample(num_samples, steps, cond=cond, guidance_scale=guidance_scale)

    latents = sample()
    samplers = [sampler] if isinstance(sampler, FastSampler) else sampler.samplers
    if not samplers:
        raise ValueError("call: it did not sample with its argument")
    setting = Setting(samplers[-1].device, samplers, repeats, depth)
    phases = [_phase("sampling", sample, _network(samplers[-1], target), setting)]
    if model is not None:
        decoder = getattr(model.autoencoder, "decoder", None)  # an engine marks its parts
        setting = replace(setting, graphed=[part for part in [model.autoencoder] if hasattr(part, "graph")])
        phases.append(_phase("decoding", _decoding(model, latents, options), decoder, setting))
    name = type(target.model if isinstance(target, Accelerated) else target).__name__
    told = [] if call is not None else [f"{num_samples} sample{'s' * (num_samples > 1)}", f"guidance {guidance_scale:g}"]
    return Profile(f"{name}: {', '.join([*told, *_described(samplers[-1])])}", tuple(phases))


@dataclass(frozen=True)
class Setting:
    """`graphed`: what runs as a CUDA graph unless its attribute `graph` is False."""

    device: torch.device
    graphed: Sequence[Any]
    repeats: int
    depth: int


def _network(sampler: FastSampler, target: Any) -> nn.Module | None:
    """The module whose children are parts if it marks none; None where they cannot be told apart: in compiled code."""
    if sampler.compile:
        return None
    candidates = (sampler.denoiser, target.model if isinstance(target, Accelerated) else None)
    return next((module for module in candidates if isinstance(module, nn.Module)), None)


def _decoding(model: Painter, latents: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
    autocast = options.get("autocast")

    def decode() -> Tensor:
        with torch.autocast(latents.device.type, autocast) if autocast is not None else nullcontext():
            return model.decode(latents)

    return decode


def _described(sampler: FastSampler) -> Iterator[str]:
    if isinstance(sampler.denoiser, DenoiserEngine):
        yield f"engine of {sampler.denoiser.precision}"
    if sampler.autocast is not None:
        yield f"autocast {str(sampler.autocast).removeprefix('torch.')}"
    if sampler.compile:
        yield "compiled"
    device, threads = sampler.device, torch.get_num_threads()
    on_cpu = f"{device.type}, {threads} thread{'s' * (threads > 1)}"
    yield torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    yield f"torch {torch.__version__}"


def _phase(name: str, call: Callable[[], Any], module: nn.Module | None, setting: Setting) -> Phase:
    """Time and record a call; the children of `module` are parts if the model marks none."""
    device, graphed = setting.device, setting.graphed
    with _without_graphs(graphed):
        call()
        entered = record(call, device).entered
    marked = module is None or not {STEP.sub("", path) for path in entered} <= {"", *COMMON}

    def recorded() -> Recording:
        with nullcontext() if marked or module is None else children_as_parts(module, setting.depth):
            return record(call, device)

    for _ in range(WARM_UP):
        call()
    times, recordings = [], []
    for _ in range(setting.repeats):  # in turn, so that both see the same clocks and the same neighbours
        times.append(_timed_ms(call, device))
        recordings.append(recorded())
    ms = statistics.median(times)
    recording = sorted(recordings, key=lambda one: one.span_ms)[len(recordings) // 2]
    if not any(activity.in_graph for activity in recording.activities):
        return make_phase(name, ms, recording, _source(device, marked))
    with _without_graphs(graphed):
        plain = recorded()
    told, found = parts_by_order(recording, plain)
    if found < ENOUGH:
        note = f"only {found:.0%} of the graph's kernels were found again in a call without it, whose parts these are"
        return make_phase(name, ms, plain, note)
    source = _source(device, marked)
    return make_phase(name, ms, told, f"{source}; one CUDA graph, its kernels told apart by their order ({found:.1%} found)")


def _source(device: torch.device, marked: bool) -> str:
    work = "kernels and copies" if device.type == "cuda" else "operators"
    return f"{work}, under the parts {'that the model marks' if marked else 'of its tree of modules'}"


def _timed_ms(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - began) * 1e3


@contextmanager
def _without_graphs(graphed: Sequence[Any]) -> Iterator[None]:
    before = [one.graph for one in graphed]
    for one in graphed:
        one.graph = False
    try:
        yield
    finally:
        for one, graph in zip(graphed, before, strict=True):
            one.graph = graph
