"""The one table of cases: op x options x dtype x channels x batch x layout.

A `Case` builds the arguments of a public function on any device (`case.inputs`) and calls it (`case.run`). A differentiable
op also returns its gradients. test_ops_agree.py runs every case on every backend against the reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

import bldm_kernels as bk

CHANNELS = (1, 7, 24, 63, 64, 100)  # and 0 once
BATCHES = (0, 1, 3)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "unaligned")
FAR = 2**40 + 3  # a sample index beyond 32 bits
BIG_SEED = 2**64 - 5
RULES = ("plugin", "marginal", "renoise")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of one public function."""

    op: str
    dtype: torch.dtype
    channels: int
    batch: int
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = (5,)
    quick: bool = False  # small and telling enough for Triton's interpreter

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        options = "".join(f"-{k}={v}" for k, v in self.options.items())
        return f"{self.op}-{dtype}-C{self.channels}-B{self.batch}-{self.layout}{options}"

    def inputs(self, device: str) -> Inputs:
        return BUILDERS[self.op](_Maker(self, device))

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The outputs, then the gradients of the inputs that have one."""
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        result = getattr(bk, self.op)(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        if not leaves:
            return outputs
        (output,) = outputs
        slope = (torch.arange(output.numel(), device=output.device) * 7 % 33 - 12) / 16  # exact in every dtype
        gradients = torch.autograd.grad(output, leaves, slope.view(output.shape).to(output.dtype))
        return (output.detach(), *gradients)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout (expanded: of its first sample)."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "unaligned":
        buffer = x.new_empty(x.numel() + 1)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)
    return x.contiguous()


class _Maker:
    """Reproducible random tensors of a case, on its device and in its layout."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.channels * 101 + case.batch)
        self.shape = (case.batch, *case.positions, case.channels)

    def option(self, name: str, default: Any = None) -> Any:
        return self.case.options.get(name, default)

    def place(self, x: Tensor, layout: str | None = None) -> Tensor:
        return lay_out(x.to(self.device), self.case.layout if layout is None else layout)

    def logits(self, gradient: bool = False) -> Tensor:
        x = torch.randn(self.shape, generator=self.generator) * 3
        flat = x.view(-1)
        if flat.numel() >= 5:
            flat[:5] = torch.tensor([0.0, -0.0, 88.0, -300.0, 1e-7])
        return self.place(x.to(self.case.dtype)).detach().requires_grad_(gradient)

    def bits(self, shape: tuple[int, ...] | None = None, layout: str | None = None) -> Tensor:
        shape = self.shape if shape is None else shape
        bits = (torch.rand(shape, generator=self.generator) < 0.5).to(torch.uint8).numpy()
        return self.place(bk.reference.pack_bits(torch.from_numpy(bits)), layout)

    def coefficients(self) -> Tensor:
        """Rows of a plugin, a marginal and a renoise step, one a sample or one for all."""
        rows = torch.cat([bk.BernoulliSchedule("cosine", 64).coefficients([40, 12, 3], rule)[:1] for rule in RULES]).to(
            self.device
        )
        if self.option("coefficients") == "per_sample":
            return rows[torch.arange(self.case.batch) % 3]
        if self.option("coefficients") == "threshold":
            return bk.BernoulliSchedule().coefficients([1], "plugin", "threshold")[0].to(self.device)
        return rows[0]

    def draw(self) -> Inputs:
        """seed, step and sample_offset: small ints, device tensors, or beyond 32 bits."""
        kind = self.option("draw")
        if kind == "tensors":
            return {
                "seed": torch.tensor([BIG_SEED - 2**64], device=self.device),
                "step": torch.tensor(7, device=self.device),
                "sample_offset": 1,
            }
        if kind == "far":
            return {"seed": BIG_SEED, "step": 2**28 - 1, "sample_offset": FAR}
        return {"seed": 3, "step": 5}

    def out(self, like: Tensor, alias: Tensor | None = None) -> Inputs:
        """out=None, a fresh tensor full of ones, or the input itself."""
        kind = self.option("out")
        if kind == "alias":
            return {"out": alias}
        return {"out": torch.full_like(like, 255 if like.dtype == torch.uint8 else 1)} if kind else {}


def _values(m: _Maker) -> Tensor:
    """About half zeros; negative, tiny and large ones elsewhere."""
    x = torch.randn(m.shape, generator=m.generator) * 100
    x = torch.where(torch.rand(m.shape, generator=m.generator) < 0.5, x, torch.zeros(()))
    return m.place(x.to(m.case.dtype).movedim(-1, m.option("dim", -1)).contiguous())


def _pack_bits(m: _Maker) -> Inputs:
    x = _values(m)
    return {"x": x, "dim": m.option("dim", -1)}


def _unpack_bits(m: _Maker) -> Inputs:
    inputs = {"packed": m.bits(), "num_bits": m.case.channels, "dtype": m.case.dtype, "dim": m.option("dim", -1)}
    return inputs


def _random_bits(m: _Maker) -> Inputs:
    draw = m.draw()
    draw.pop("step")
    out = m.out(m.bits(layout="contiguous"))
    return {"num_samples": m.case.batch, "shape": m.shape[1:], "device": m.device, **draw, **out}


def _flip_step(m: _Maker) -> Inputs:
    x_t = m.bits(layout="contiguous" if m.option("out") == "alias" else None)
    inputs = {"logits": m.logits(), "x_t": x_t, "coefficients": m.coefficients(), **m.draw()}
    if m.option("prediction"):
        inputs["prediction"] = m.option("prediction")
    if m.option("temperature"):
        inputs["temperature"] = m.option("temperature")
    if m.option("guidance"):
        inputs["uncond_logits"], inputs["guidance_scale"] = m.logits(), m.option("guidance")
    if m.option("draw") == "tensors":
        inputs["sample_offset"] = torch.tensor(FAR, device=m.device)
        inputs["uncond_logits"], inputs["guidance_scale"] = m.logits(), torch.tensor([2.5], device=m.device)
    if m.option("mask"):
        shape = m.shape if m.option("mask") == "per_sample" else m.shape[1:]
        inputs["keep_mask"], inputs["keep_bits"] = m.bits(shape), m.bits(shape)
    if m.option("count"):
        inputs["nonfinite"] = torch.zeros(1, dtype=torch.int32, device=m.device)
    return {**inputs, **m.out(m.bits(layout="contiguous"), x_t)}


def _flip_probability(m: _Maker) -> Inputs:
    inputs = {"logits": m.logits(gradient=True), "x_t": m.bits(), "coefficients": m.coefficients()}
    return {**inputs, **{k: v for k, v in m.case.options.items() if k in ("temperature", "prediction")}}


def _add_noise(m: _Maker) -> Inputs:
    p = {
        "scalar": 0.3,
        "one": torch.tensor([1e-3], device=m.device),
        "per_sample": torch.linspace(0, 1, max(m.case.batch, 1), device=m.device)[: m.case.batch],
    }[m.option("p", "scalar")]
    x_0 = m.bits(layout="contiguous" if m.option("out") == "alias" else None)
    out = m.out(m.bits(layout="contiguous"), x_0)
    return {"x_0": x_0, "flip_probability": p, "num_bits": m.case.channels, **m.draw(), **out}


def _binarize(m: _Maker) -> Inputs:
    dim = m.option("dim", -1)
    logits = m.place(m.logits().movedim(-1, dim).contiguous())
    draw = {"mode": "threshold"} if m.option("mode") == "threshold" else m.draw()
    return {"logits": logits, "dim": dim, **draw, **m.out(m.bits(layout="contiguous"))}


def _binarize_straight_through(m: _Maker) -> Inputs:
    dim = m.option("dim", -1)
    logits = m.place(m.logits().movedim(-1, dim).contiguous()).requires_grad_()
    return {"logits": logits, "dim": dim, "seed": 4}


def _flip_loss(m: _Maker) -> Inputs:
    inputs = {"logits": m.logits(gradient=True), "x_0": m.bits(), "x_t": m.bits()}
    if m.option("weight"):
        inputs["weight"] = torch.linspace(0.1, 1, max(m.case.batch, 1), device=m.device)[: m.case.batch]
    plain = ("focal_gamma", "balanced", "prediction", "reduction")
    return {**inputs, **{k: v for k, v in m.case.options.items() if k in plain}}


def _embed_bits(m: _Maker) -> Inputs:
    width = m.option("width", 33)
    gradient = not m.option("out")
    weight = torch.randn(m.case.channels, width, generator=m.generator).to(m.case.dtype)
    inputs: Inputs = {"packed": m.bits(), "weight": m.place(weight).detach().requires_grad_(gradient)}
    if m.option("bias"):
        bias = torch.randn(width, generator=m.generator).to(m.case.dtype)
        inputs["bias"] = bias.to(m.device).requires_grad_(gradient)
    if "signed" in m.case.options:
        inputs["signed"] = m.option("signed")
    out_shape = (*m.shape[:-1], width)
    return {**inputs, **m.out(torch.empty(out_shape, dtype=m.case.dtype, device=m.device))}


def _hamming_distance(m: _Maker) -> Inputs:
    other = (1, *m.shape[1:]) if m.option("one") else m.shape
    return {"a": m.bits(), "b": m.bits(other)}


def _hamming_topk(m: _Maker) -> Inputs:
    size = m.option("database", 37)
    return {"queries": m.bits(), "database": m.bits((size, *m.shape[1:])), "k": m.option("k", 5)}


BUILDERS: dict[str, Callable[[_Maker], Inputs]] = {
    "pack_bits": _pack_bits,
    "unpack_bits": _unpack_bits,
    "random_bits": _random_bits,
    "flip_step": _flip_step,
    "flip_probability": _flip_probability,
    "add_noise": _add_noise,
    "binarize": _binarize,
    "binarize_straight_through": _binarize_straight_through,
    "flip_loss": _flip_loss,
    "embed_bits": _embed_bits,
    "hamming_distance": _hamming_distance,
    "hamming_topk": _hamming_topk,
}

# The dtypes an op's main input takes (uint8 stands for packed bits).
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "pack_bits": (*FLOATS, torch.float64, *INTEGERS),
    "unpack_bits": (*FLOATS, torch.float64, *INTEGERS),
    "random_bits": (torch.uint8,),
    "add_noise": (torch.uint8,),
    "hamming_distance": (torch.uint8,),
    "hamming_topk": (torch.uint8,),
}

# Beyond the plain call: what each op is asked for in turn.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "pack_bits": [{"dim": 1}, {"dim": 0}],
    "unpack_bits": [{"dim": 1}, {"dim": 0}],
    "random_bits": [{"draw": "tensors"}, {"draw": "far"}, {"out": "given"}],
    "flip_step": [
        {"coefficients": "per_sample"},
        {"coefficients": "threshold"},
        {"prediction": "x_0"},
        {"temperature": 0.7},
        {"guidance": 2.5},
        {"guidance": 1.0, "prediction": "x_0", "temperature": 1.3},
        {"mask": "per_sample"},
        {"mask": "shared"},
        {"draw": "tensors"},
        {"draw": "far"},
        {"out": "given", "count": True},
        {"out": "alias", "prediction": "x_0"},
        {"out": "alias", "mask": "shared", "coefficients": "per_sample", "guidance": 3.0, "draw": "tensors"},
    ],
    "flip_probability": [
        {"prediction": "x_0"},
        {"temperature": 0.7, "coefficients": "per_sample"},
    ],
    "add_noise": [{"p": "one"}, {"p": "per_sample"}, {"draw": "tensors"}, {"draw": "far"}, {"out": "given"}, {"out": "alias"}],
    "binarize": [
        {"mode": "threshold"},
        {"dim": 1},
        {"dim": 1, "mode": "threshold"},
        {"draw": "far"},
        {"draw": "tensors"},
        {"out": "given"},
    ],
    "binarize_straight_through": [{"dim": 1}],
    "flip_loss": [
        {"focal_gamma": 0.0},
        {"focal_gamma": 2.0, "prediction": "x_0"},
        {"focal_gamma": 1.5, "balanced": False},
        {"balanced": True, "weight": True, "reduction": "sum"},
        {"weight": True, "reduction": "sample"},
    ],
    "embed_bits": [
        {"signed": False},
        {"bias": True},
        {"bias": True, "signed": False, "width": 1},
        {"out": "given"},
        {"width": 64, "bias": True},
    ],
    "hamming_distance": [{"one": True}],
    "hamming_topk": [{"k": 37}, {"k": 1, "database": 1}],
}


def _dtypes(op: str) -> tuple[torch.dtype, ...]:
    return DTYPES.get(op, FLOATS)


def _cases_of(op: str) -> Iterator[Case]:
    dtypes = _dtypes(op)
    # The plain call: every width and batch; dtypes in full for the floating ops, in turn where there are many.
    for i, (channels, batch) in enumerate(product(CHANNELS, BATCHES)):
        for j, dtype in enumerate(dtypes if len(dtypes) <= 3 else (dtypes[i % len(dtypes)], dtypes[(i + 5) % len(dtypes)])):
            yield Case(op, dtype, channels, batch, quick=j == i % len(dtypes) and batch != 1)
    for i, layout in enumerate(LAYOUTS[1:]):
        for j, dtype in enumerate(dtypes):
            yield Case(op, dtype, 63, 3, layout, quick=i % len(dtypes) == j)
            yield Case(op, dtype, 64, 3, layout)
    for i, options in enumerate(OPTIONS[op]):
        for j, dtype in enumerate(dtypes):
            positions = (2, 3) if i % 2 else (5,)
            yield Case(op, dtype, 24, 3, "contiguous", options, positions, quick=i % len(dtypes) == j)
            yield Case(op, dtype, 100, 2, LAYOUTS[(i + j) % 4], options, positions)
            yield Case(op, dtype, 64, 3, "unaligned", options, (70,))
            if options.get("dim") == 1:  # positions by whole vectors, in several tiles that are not full
                for wide in (7, 64, 100):
                    yield Case(op, dtype, wide, 2, "contiguous", options, (16, 80), quick=wide == 7)
        yield Case(op, dtypes[0], 24, 0, "contiguous", options)
    yield Case(op, dtypes[0], 0, 3, quick=True)
    # Enough bits for every vector width, loop tail and thread.
    yield Case(op, dtypes[0], 64, 5, positions=(16, 16))
    yield Case(op, dtypes[-1], 100, 9, positions=(257,))


CASES = [case for op in BUILDERS for case in _cases_of(op)]
