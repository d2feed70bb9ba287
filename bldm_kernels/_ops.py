"""Every operator of `torch.ops.bldm`: schema, fake kernel, autograd, and the canonical call a backend receives.

An op `name(...) -> Tensor` that sampling calls in a loop has a twin `name_out(..., *, out)`. For both, `_run_name` brings the
arguments into canonical form and calls the chosen backend's kernel, which fills `out`. Canonical tensors are contiguous:
logits (B, R, C), packed (B, R, P) with P = ceil(C / 8), coefficients (1 or B, 4) float32. The public functions check
arguments before they come here; the dispatcher key is the composite one, so every device and every torch tool works.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .canonical import (
    as_flat,
    as_rows,
    broadcast_samples,
    coefficient_rows,
    num_bytes,
    outer_inner,
    result_dtype,
    split_at,
    without_padding,
)
from .dispatch import select

_library = torch.library.Library("bldm", "DEF")
_RANDOM = "SymInt seed, SymInt step, SymInt sample_offset, Tensor? seed_tensor, Tensor? step_tensor"


def _define(
    name: str, arguments: str, run: Callable[..., None], allocate: Callable[..., Any], *, out: bool
) -> Callable[..., Any]:
    """Define `name` (allocates, then runs), and with `out` also `name_out` (writes into the caller's tensor).

    Returns what the op does on tensors that have no gradient: allocate and run.
    """

    def functional(*args: Any) -> Any:
        result = allocate(*args)
        run(*args, *(result if isinstance(result, tuple) else (result,)))
        return result

    results = "(Tensor, Tensor)" if name in ("flip_loss", "hamming_topk") else "Tensor"
    _library.define(f"{name}({arguments}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, functional, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bldm::{name}", allocate, lib=_library)
    if out:

        def write(*args: Any, out: Tensor) -> None:
            run(*args, out)

        _library.define(f"{name}_out({arguments}, *, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(f"{name}_out", write, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bldm::{name}_out", lambda *args, out: None, lib=_library)
    return functional


# --- packed bits -----------------------------------------------------------------------------------------------------
def _packed_shape(x: Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    channels = shape.pop(dim)
    return [*shape, num_bytes(channels)]


def _allocate_pack_bits(x: Tensor, dim: int) -> Tensor:
    return x.new_empty(_packed_shape(x, dim), dtype=torch.uint8)


def _run_pack_bits(x: Tensor, dim: int, out: Tensor) -> None:
    channels = x.shape[dim]
    x, outer, inner = split_at(x, dim)
    if out.numel():
        kernel = select("pack_bits", out.device)
        kernel(x.view(outer, channels, inner), out.view(outer, inner, out.shape[-1]))


_define("pack_bits", "Tensor x, int dim", _run_pack_bits, _allocate_pack_bits, out=True)


def _allocate_unpack_bits(packed: Tensor, num_bits: int, dtype: torch.dtype, dim: int) -> Tensor:
    shape = list(packed.shape[:-1])
    shape.insert(dim % packed.dim(), num_bits)
    return packed.new_empty(shape, dtype=dtype)


def _run_unpack_bits(packed: Tensor, num_bits: int, dtype: torch.dtype, dim: int, out: Tensor) -> None:
    if not out.numel():
        return
    outer, inner = outer_inner(out, dim)
    kernel = select("unpack_bits", out.device)
    kernel(packed.contiguous().view(outer, inner, packed.shape[-1]), out.view(outer, num_bits, inner))


_define(
    "unpack_bits",
    "Tensor packed, SymInt num_bits, ScalarType dtype, int dim",
    _run_unpack_bits,
    _allocate_unpack_bits,
    out=True,
)


def _run_random_bits(num_bits: int, seed: int, sample_offset: int, seed_tensor: Tensor | None, *, out: Tensor) -> None:
    if out.numel():
        select("random_bits", out.device)(num_bits, seed, sample_offset, seed_tensor, as_rows(out))


# A factory has no tensor to dispatch on: only the out form exists, the public function allocates.
_library.define(
    "random_bits_out(SymInt num_bits, SymInt seed, SymInt sample_offset, Tensor? seed_tensor, *, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("random_bits_out", _run_random_bits, "CompositeExplicitAutograd")
torch.library.register_fake("bldm::random_bits_out", lambda *args, out: None, lib=_library)


# --- the Bernoulli diffusion step ------------------------------------------------------------------------------------


def _run_flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    temperature: float,
    x0_prediction: bool,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    guidance_tensor: Tensor | None,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
    nonfinite: Tensor | None,
    *,
    out: Tensor,
) -> None:
    if not out.numel():
        return
    kernel = select("flip_step", out.device, logits.dtype)
    kernel(
        as_rows(logits),
        as_rows(x_t),
        coefficient_rows(coefficients),
        seed,
        step,
        sample_offset,
        seed_tensor,
        step_tensor,
        offset_tensor,
        temperature,
        x0_prediction,
        None if uncond_logits is None else as_rows(uncond_logits),
        guidance_scale,
        guidance_tensor,
        without_padding(broadcast_samples(keep_mask, x_t), logits.shape[-1]),  # so that padding stays 0
        broadcast_samples(keep_bits, x_t),
        nonfinite,
        as_rows(out),
    )


_STEP_ARGUMENTS = (
    f"Tensor logits, Tensor x_t, Tensor coefficients, {_RANDOM}, Tensor? offset_tensor, float temperature, "
    "bool x0_prediction, Tensor? uncond_logits, float guidance_scale, Tensor? guidance_tensor, Tensor? keep_mask, "
    "Tensor? keep_bits"
)
# The counter of non-finite logits is written too, so both forms of the op say so in their schema.
_library.define(f"flip_step({_STEP_ARGUMENTS}, Tensor(b!)? nonfinite) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"flip_step_out({_STEP_ARGUMENTS}, Tensor(b!)? nonfinite, *, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _flip_step(logits: Tensor, x_t: Tensor, *args: Any) -> Tensor:
    out = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    _run_flip_step(logits, x_t, *args, out=out)
    return out


_library.impl("flip_step", _flip_step, "CompositeExplicitAutograd")
_library.impl("flip_step_out", _run_flip_step, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bldm::flip_step",
    lambda logits, x_t, *args: torch.empty_like(x_t, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_fake("bldm::flip_step_out", lambda *args, out: None, lib=_library)


def _allocate_flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=result_dtype(logits))


def _run_flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool, out: Tensor
) -> None:
    if out.numel():
        kernel = select("flip_probability", out.device, logits.dtype)
        kernel(as_rows(logits), as_rows(x_t), coefficient_rows(coefficients), temperature, x0_prediction, as_rows(out))


_PROBABILITY_ARGUMENTS = "Tensor logits, Tensor x_t, Tensor coefficients, float temperature, bool x0_prediction"
run_flip_probability = _define(
    "flip_probability", _PROBABILITY_ARGUMENTS, _run_flip_probability, _allocate_flip_probability, out=False
)


def _run_flip_probability_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    temperature: float,
    x0_prediction: bool,
    out: Tensor,
) -> None:
    if out.numel():
        kernel = select("flip_probability_backward", out.device, logits.dtype)
        rows = coefficient_rows(coefficients)
        kernel(as_rows(grad), as_rows(logits), as_rows(x_t), rows, temperature, x0_prediction, as_rows(out))


def _allocate_like_logits(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


run_flip_probability_backward = _define(
    "flip_probability_backward",
    f"Tensor grad, {_PROBABILITY_ARGUMENTS}",
    _run_flip_probability_backward,
    _allocate_like_logits,
    out=False,
)


def _run_add_noise(
    x_0: Tensor,
    flip_probability: Tensor,
    num_bits: int,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    if out.numel():
        kernel = select("add_noise", out.device)
        probability = flip_probability.contiguous().view(-1)
        kernel(as_rows(x_0), probability, num_bits, seed, step, sample_offset, seed_tensor, step_tensor, as_rows(out))


_define(
    "add_noise",
    f"Tensor x_0, Tensor flip_probability, SymInt num_bits, {_RANDOM}",
    _run_add_noise,
    lambda x_0, *args: torch.empty_like(x_0, memory_format=torch.contiguous_format),
    out=True,
)


# --- binarize --------------------------------------------------------------------------------------------------------
def _run_binarize(
    logits: Tensor,
    dim: int,
    bernoulli: bool,
    seed: int,
    step: int,
    sample_offset: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    out: Tensor,
) -> None:
    """The kernel sees logits (B, O, C, I) and writes packed (B, O I, P): channels last is I = 1, (B, C, H, W) is O = 1."""
    if out.numel():
        batch, channels = logits.shape[0], logits.shape[dim]
        logits, outer, inner = split_at(logits, dim)
        kernel = select("binarize", out.device, logits.dtype)
        view = logits.view(batch, outer // batch, channels, inner)
        kernel(view, bernoulli, seed, step, sample_offset, seed_tensor, step_tensor, out.view(batch, -1, out.shape[-1]))


_define(
    "binarize",
    f"Tensor logits, int dim, bool bernoulli, {_RANDOM}",
    _run_binarize,
    lambda logits, dim, *args: _allocate_pack_bits(logits, dim),
    out=True,
)


def _run_straight_through(logits: Tensor, packed: Tensor, dim: int, out: Tensor) -> None:
    _run_unpack_bits(packed, logits.shape[dim], logits.dtype, dim, out)


_define(
    "straight_through",
    "Tensor logits, Tensor packed, int dim",
    _run_straight_through,
    lambda logits, packed, dim: logits.new_empty(logits.shape),
    out=False,
)


def _straight_through_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _straight_through_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """The bits stand for sigmoid(logits) in the backward pass (Bengio et al. 2013; BLD eq. 4)."""
    (logits,) = ctx.saved_tensors
    return torch.ops.aten.sigmoid_backward(grad.to(logits.dtype), torch.sigmoid(logits)), None, None


# --- the loss --------------------------------------------------------------------------------------------------------
_LOSS_INPUTS = "Tensor logits, Tensor x_0, Tensor x_t, Tensor? weight"


def _loss_factor(logits: Tensor, reduction: str) -> float:
    """The loss is this times the sum over the bits: of a sample, or of all."""
    if reduction == "sum":
        return 1.0
    return (len(logits) if reduction == "sample" else 1) / logits.numel()


def _run_flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    reduction: str,
    loss: Tensor,
    set_fraction: Tensor,
) -> None:
    if not logits.numel():
        loss.fill_(math.nan if reduction == "mean" and not len(logits) else 0.0)
        set_fraction.zero_()
        return
    kernel = select("flip_loss", loss.device, logits.dtype)
    rows = (as_rows(logits), as_rows(x_0), as_rows(x_t))
    weight = None if weight is None else weight.to(loss.dtype).contiguous()
    fraction = set_fraction if balanced else None
    kernel(*rows, weight, focal_gamma, x0_prediction, _loss_factor(logits, reduction), loss, fraction)


def _allocate_flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and the fraction of set targets of every sample, which the backward of the balanced form needs."""
    batch, dtype = logits.shape[0], result_dtype(logits)
    loss = logits.new_empty((batch,) if reduction == "sample" else (), dtype=dtype)
    return loss, logits.new_empty((batch if balanced else 0,), dtype=dtype)


run_flip_loss = _define(
    "flip_loss",
    f"{_LOSS_INPUTS}, float focal_gamma, bool balanced, bool x0_prediction, str reduction",
    _run_flip_loss,
    _allocate_flip_loss,
    out=False,
)


def _run_flip_loss_backward(
    grad: Tensor,
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    set_fraction: Tensor,
    focal_gamma: float,
    x0_prediction: bool,
    reduction: str,
    out: Tensor,
) -> None:
    """`grad` belongs to the loss, one element or (B,); `set_fraction` is what `flip_loss` returned, (B,) or empty."""
    if out.numel():
        kernel = select("flip_loss_backward", out.device, logits.dtype)
        dtype = result_dtype(logits)
        rows = (as_rows(logits), as_rows(x_0), as_rows(x_t))
        weight = None if weight is None else weight.to(dtype).contiguous()
        fraction = set_fraction if set_fraction.numel() else None
        options = (focal_gamma, x0_prediction, _loss_factor(logits, reduction))
        kernel(grad.to(dtype).contiguous(), *rows, weight, fraction, *options, as_rows(out))


run_flip_loss_backward = _define(
    "flip_loss_backward",
    f"Tensor grad, {_LOSS_INPUTS}, Tensor set_fraction, float focal_gamma, bool x0_prediction, str reduction",
    _run_flip_loss_backward,
    _allocate_like_logits,
    out=False,
)


# --- products with bits, distances -----------------------------------------------------------------------------------
def _run_embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool, out: Tensor) -> None:
    if not weight.shape[0]:  # no bits: nothing for a kernel to read
        out.zero_() if bias is None else out.copy_(bias)
    elif out.numel():
        kernel = select("embed_bits", out.device, weight.dtype)
        bias = None if bias is None else bias.contiguous()
        rows = packed.contiguous().view(out.numel() // out.shape[-1], packed.shape[-1])
        kernel(rows, weight.contiguous(), bias, signed, out.view(-1, out.shape[-1]))


_define(
    "embed_bits",
    "Tensor packed, Tensor weight, Tensor? bias, bool signed",
    _run_embed_bits,
    lambda packed, weight, bias, signed: weight.new_empty((*packed.shape[:-1], weight.shape[1])),
    out=True,
)


def _run_embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool, out: Tensor) -> None:
    if grad.numel() and out.numel():
        kernel = select("embed_bits_backward", out.device, grad.dtype)
        rows = packed.contiguous().view(-1, packed.shape[-1])
        kernel(grad.contiguous().view(-1, grad.shape[-1]), rows, num_bits, signed, out)
    else:
        out.zero_()


_define(
    "embed_bits_backward",
    "Tensor grad, Tensor packed, SymInt num_bits, bool signed",
    _run_embed_bits_backward,
    lambda grad, packed, num_bits, signed: grad.new_empty((num_bits, grad.shape[-1])),
    out=False,
)


def _run_hamming_distance(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.numel():
        select("hamming_distance", out.device)(as_flat(a), as_flat(b), out)
    else:
        out.zero_()


_define(
    "hamming_distance",
    "Tensor a, Tensor b",
    _run_hamming_distance,
    lambda a, b: a.new_empty(a.shape[:1], dtype=torch.int32),
    out=False,
)


def _run_hamming_topk(queries: Tensor, database: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
    if distances.numel() and queries.numel():
        select("hamming_topk", distances.device)(as_flat(queries), as_flat(database), k, distances, indices)
    else:
        distances.zero_()
        indices.copy_(torch.arange(k, device=indices.device).expand_as(indices))


_define(
    "hamming_topk",
    "Tensor queries, Tensor database, int k",
    _run_hamming_topk,
    lambda queries, database, k: (
        queries.new_empty((queries.shape[0], k), dtype=torch.int32),
        queries.new_empty((queries.shape[0], k), dtype=torch.int64),
    ),
    out=False,
)


# --- autograd --------------------------------------------------------------------------------------------------------
def _embed_bits_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, weight, bias, ctx.signed = inputs
    ctx.num_bits, ctx.has_bias = weight.shape[0], bias is not None
    ctx.save_for_backward(packed)


def _embed_bits_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    weight = torch.ops.bldm.embed_bits_backward(grad, packed, ctx.num_bits, ctx.signed)
    return None, weight, grad.flatten(0, -2).sum(0) if ctx.has_bias else None, None


for _name, _context, _backward in (
    ("straight_through", _straight_through_context, _straight_through_backward),
    ("embed_bits", _embed_bits_context, _embed_bits_grad),
):
    torch.library.register_autograd(f"bldm::{_name}", _backward, setup_context=_context, lib=_library)
