"""DenoiserEngine: a BinaryDenoiser prepared for inference in low precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk
from bldm_kernels.inference import embed, head
from bldm_kernels.inference.embed import embed_tokens
from bldm_kernels.inference.head import Head, fold_head, head_logits, head_step

from ..denoiser import TIME_EMBEDDINGS, BinaryDenoiser, Conditioned
from ..parts import part
from .blocks import EngineBlock, Scales, set_offsets
from .calibrate import Call, calibrate, gain
from .report import Part, warn_of_fallbacks
from .stack import BlockStack
from .stream import StreamKernels

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the residual stream


@dataclass(frozen=True)
class Conditions:
    """What a batch is conditioned on, the same in all steps; None: there is none, or all are there.

    token: (1, W) for all rows or (rows, W); mask: bool (rows, T), the tokens that are there; kv: keys and values of the text
    (rows, L, 2 W), one a block; kv_mask: bool (rows, L).
    """

    token: Tensor | None = None
    mask: Tensor | None = None
    kv: tuple[Tensor, ...] = ()
    kv_mask: Tensor | None = None


class DenoiserEngine(nn.Module, Conditioned):
    """Made by `BinaryDenoiser.optimize`; called like the model, and takes its place in a `FastSampler`.

    There it makes whole steps (`begin`): what depends on time and condition alone is computed once before the loop, and the
    product of the head, the flip and the packing are one, so that logits never reach memory.

    Args:
        as of `BinaryDenoiser.optimize`, and the model. Its weights are copied: later changes are followed by `refresh` only.
    """

    positions: Tensor
    token_weight: Tensor
    shift: Tensor
    head_weight: Tensor
    head_sums: Tensor
    head_bias: Tensor
    one: Tensor

    @torch.no_grad()
    def __init__(
        self,
        model: BinaryDenoiser,
        precision: str = "bf16",
        calibration: Tensor | None = None,
        calibration_cond: Tensor | None = None,
        schedule: bk.BernoulliSchedule | None = None,
        prediction: str = "flip",
    ):
        super().__init__()
        bk.checks.option("precision", precision, DTYPES)
        bk.checks.option("prediction", prediction, ("flip", "x_0"))
        scales: list[Scales] = [{} for _ in model.blocks]
        calls: list[Call] = []
        if precision == "fp8":
            schedule = bk.BernoulliSchedule("linear", model.num_steps) if schedule is None else schedule
            scales, calls = calibrate(model, schedule, prediction, calibration, calibration_cond)
        self.precision, self.dtype = precision, DTYPES[precision]
        self.num_positions, self.num_bits, self.num_steps = model.num_positions, model.num_bits, model.num_steps
        self.num_classes, self.null_class, self.null_label = model.num_classes, model.null_class, model.null_label
        self.text_width, self.cross_attention = model.text_width, model.cross_attention
        self.time_embedding, self.width = model.time_embedding, model.token_weight.shape[1]
        blocks = zip(model.blocks, scales, strict=True)
        self.blocks = nn.ModuleList(EngineBlock(block, self.dtype, known) for block, known in blocks)  # type: ignore
        self._begin_layouts()
        self.register_buffer("token_weight", model.token_weight.to(self.dtype, copy=True))
        self.register_buffer("shift", set_offsets(self.blocks))  # type: ignore[arg-type]
        self.register_buffer("positions", model.positions.float() + model.token_bias.float() + self.shift)
        head = _folded(model, self.dtype)
        self.head_eps = head.eps
        for name in ("weight", "sums", "bias"):
            self.register_buffer(f"head_{name}", getattr(head, name))
        self.register_buffer("one", torch.ones(1, dtype=torch.int64, device=self.positions.device))
        # a few rows a run, so in float32
        self.time = copy.deepcopy(model.time).float()
        self.classes, self.text = copy.deepcopy(model.classes), copy.deepcopy(model.text)
        self.eval().requires_grad_(False)
        if calls:
            longer = _folded(model, self.dtype, gain(self, calls))
            for mine, value in zip(self.head[:3], longer[:3], strict=True):
                mine.copy_(value)
            self._begin_layouts()
        if self.positions.is_cuda and precision != "float32":
            warn_of_fallbacks(self.report())

    def _begin_layouts(self) -> None:
        """Weights in the order of kernels that want another one: made when a batch first needs them."""
        self.stack = BlockStack(self.blocks)  # type: ignore[arg-type]
        self.kernels = StreamKernels([stage for block in self.blocks for stage in block.stages()])  # type: ignore

    def refresh(self, model: BinaryDenoiser, **calibration: Any) -> None:
        """Take over the weights that `model`, of the same configuration, has now: in place, so that captured graphs follow.

        `calibration`: as in `BinaryDenoiser.optimize`.
        """
        fresh = dict(model.optimize(self.precision, **calibration).state_dict())
        mine = dict(self.state_dict())
        if {name: value.shape for name, value in fresh.items()} != {name: value.shape for name, value in mine.items()}:
            raise ValueError("model: expected the configuration of the model that this engine was made from")
        for name, value in mine.items():
            value.copy_(fresh[name])
        self.stack.refresh()
        self.kernels.refresh()

    def report(self) -> tuple[Part, ...]:
        """What runs every part, so that a fallback to PyTorch is seen; parts of blocks that are alike are named once."""
        extra = 1 + (self.classes is not None or self.text is not None)
        h = torch.empty(1, self.num_positions + extra, self.width, dtype=self.dtype, device=self.positions.device)
        inside = [part for block in self.blocks for part in block.report(h.shape[1])]  # type: ignore
        parts = [Part.of("embed", (self.num_positions, self.num_bits), embed.supports(h, extra))]
        parts += [*self.stack.report(h), *self.kernels.report(h), *(Part(f"blocks/{name}", *rest) for name, *rest in inside)]
        parts.append(Part.of("head", h.shape[1:], head.supports(h, self.head)))
        return tuple(dict.fromkeys(parts))

    @property
    def head(self) -> Head:
        return Head(self.head_weight, self.head_sums, self.head_bias, self.head_eps)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits float32 (B, ..., C); arguments and errors as of `BinaryDenoiser.forward`."""
        bk.checks.packed("x_t", x_t, min_dim=3)
        bk.checks.tensor("t", t, (torch.int64,))
        bk.checks.shape("t", t, x_t.shape[:1], "one a sample")
        with _plainly(x_t):
            return self._logits(x_t, self._time_tokens(t), self._conditions(label, len(x_t)), len(x_t))

    def begin(self, times: Tensor, label: Tensor | None, rows: int) -> "Run":
        """The steps at timesteps `times` int64 (S,) of a batch of `rows` samples with conditions `label` as in `forward`."""
        bk.checks.tensor("times", times, (torch.int64,))
        with _plainly(times):
            return Run(self, self._time_tokens(times), self._conditions(label, rows), rows)

    def _pdl(self, h: Tensor) -> bool:
        """Whether launches depend: where most are cuBLASLt's, which has none that do, they cost more than they gain."""
        return h.is_cuda and (self.precision == "fp8" or self.kernels.supports(h))

    def _time_tokens(self, times: Tensor) -> Tensor:
        """(S, W): the tokens of timesteps (S,)."""
        with part("time and condition"):
            token = self.time(TIME_EMBEDDINGS[self.time_embedding](times, self.num_steps, self.width))
            return (token + self.shift).to(self.dtype)

    def _conditions(self, label: Tensor | None, rows: int) -> Conditions:
        if label is not None:
            self._check_label(label, rows)
        with part("time and condition"):
            if self.cross_attention:
                kv = tuple(block.cross.keys_and_values(label, rows) for block in self.blocks)  # type: ignore
                return Conditions(kv=kv, kv_mask=None if label is None else self._words(label))
            token, there = self._condition_token(label, self.one)
            mask = None
            if there is not None:
                mask = torch.cat([there.new_ones(rows, self.num_positions + 1), there.unsqueeze(1)], dim=1)
            return Conditions(None if token is None else (token + self.shift).to(self.dtype), mask)

    def _transform(self, x_t: Tensor, time: Tensor, conditions: Conditions, rows: int) -> Tensor:
        """The residual stream (rows, T, W) behind the last block; time (1, W) or (rows, W); x_t of rows, or of each half."""
        if x_t.shape[1:-1].numel() != self.num_positions:
            raise ValueError(f"x_t: expected {self.num_positions} positions a sample, got shape {tuple(x_t.shape)}")
        extra = [time] if conditions.token is None else [time, conditions.token]
        h = torch.empty(rows, self.num_positions + len(extra), self.width, dtype=self.dtype, device=x_t.device)
        with part("embed"):
            embed_tokens(x_t.flatten(1, -2), self.token_weight, self.positions, extra, h, pdl=self._pdl(h))
        if conditions.mask is None and self.stack.supports(h):
            with part("all blocks"):
                self.stack(h)
            return h
        stream = self.kernels.stream(h, self._pdl(h))
        for i, block in enumerate(self.blocks):
            kv = conditions.kv[i] if conditions.kv else None
            with part(f"block {i}"):
                block(stream, rows, conditions.mask, kv, conditions.kv_mask)
        return h

    def _logits(self, x_t: Tensor, time: Tensor, conditions: Conditions, rows: int) -> Tensor:
        h = self._transform(x_t, time, conditions, rows)
        with part("head"):
            logits = head_logits(h, self.head, self.num_positions, pdl=self._pdl(h))
        return logits.view(rows, *x_t.shape[1:-1], self.num_bits)


class Run:
    """The steps of one batch, with the tables of what depends on time and condition alone (sampling/steps.py)."""

    def __init__(self, engine: DenoiserEngine, times: Tensor, conditions: Conditions, rows: int):
        self.engine, self.times, self.conditions, self.rows = engine, times, conditions, rows

    def logits(self, i: int, x_t: Tensor) -> Tensor:
        """Logits float32 (rows, ..., C) of step i; x_t of rows samples, or of half of them, which both halves share."""
        with _plainly(x_t):
            return self.engine._logits(x_t, self.times[i : i + 1], self.conditions, self.rows)

    def flip(self, i: int, x_t: Tensor, coefficients: Tensor, **options: Any) -> Tensor:
        """x_t (B, ..., P) -> x_s: `bk.flip_step` of step i's logits; options as of `head_step`. With guidance rows is 2 B."""
        engine = self.engine
        for name in ("keep_mask", "keep_bits"):
            if options.get(name) is not None:
                options[name] = options[name].flatten(1, -2)
        with _plainly(x_t):
            h = engine._transform(x_t, self.times[i : i + 1], self.conditions, self.rows)
            with part("head and flip"):
                arguments = (h, engine.head, x_t.flatten(1, -2), coefficients)
                return head_step(*arguments, step=i, pdl=engine._pdl(h), **options).view(x_t.shape)


def _folded(model: BinaryDenoiser, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Head:
    """The model's norm and head, and what its logits are multiplied by."""
    norm, last = model.norm, model.head
    weight, bias = last.weight.double() * gain, last.bias.double() * gain
    return fold_head(norm.weight, norm.bias, weight, bias, eps=norm.eps, dtype=dtype)


@contextmanager
def _plainly(x: Tensor) -> Iterator[None]:
    """Without gradients, and in the engine's own precision whatever autocast says."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield
