"""The operators of `torch.ops.bldm`: schema, fake kernel, autograd, and the canonical call a backend receives.

Here: how one is defined, and packed bits with what is computed from them. Steps, noise and loss: `_diffusion_ops.py`.

An op `name(...) -> Tensor` that sampling calls in a loop has a twin `name_out(..., *, out)`. For both, `_run_name` brings the
arguments into canonical form and calls the chosen backend's kernel, which fills `out`. Canonical tensors are contiguous:
logits (B, R, C), packed (B, R, P) with P = ceil(C / 8), coefficients (1 or B, 4) float32. The public functions check
arguments before they come here; the dispatcher key is the composite one, so every device and every torch tool works.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .canonical import as_flat, as_rows, num_bytes, outer_inner, split_at
from .dispatch import select

library = torch.library.Library("bldm", "DEF")
RANDOM = "SymInt seed, SymInt step, SymInt sample_offset, Tensor? seed_tensor, Tensor? step_tensor"


def define(name: str, arguments: str, run: Callable[..., None], allocate: Callable[..., Any], *, out: bool) -> Callable[..., Any]:
    """Define `name` (allocates, then runs), and with `out` also `name_out` (writes into the caller's tensor).

    Returns what the op does on tensors that have no gradient: allocate and run.
    """

    def functional(*args: Any) -> Any:
        result = allocate(*args)
        run(*args, *(result if isinstance(result, tuple) else (result,)))
        return result

    results = "(Tensor, Tensor)" if name in ("flip_loss", "hamming_topk") else "Tensor"
    library.define(f"{name}({arguments}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, functional, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bldm::{name}", allocate, lib=library)
    if out:

        def write(*args: Any, out: Tensor) -> None:
            run(*args, out)

        library.define(f"{name}_out({arguments}, *, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(f"{name}_out", write, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bldm::{name}_out", lambda *args, out: None, lib=library)
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


define("pack_bits", "Tensor x, int dim", _run_pack_bits, _allocate_pack_bits, out=True)


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


define(
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
library.define(
    "random_bits_out(SymInt num_bits, SymInt seed, SymInt sample_offset, Tensor? seed_tensor, *, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("random_bits_out", _run_random_bits, "CompositeExplicitAutograd")
torch.library.register_fake("bldm::random_bits_out", lambda *args, out: None, lib=library)


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


define(
    "binarize",
    f"Tensor logits, int dim, bool bernoulli, {RANDOM}",
    _run_binarize,
    lambda logits, dim, *args: _allocate_pack_bits(logits, dim),
    out=True,
)


def _run_straight_through(logits: Tensor, packed: Tensor, dim: int, out: Tensor) -> None:
    _run_unpack_bits(packed, logits.shape[dim], logits.dtype, dim, out)


define(
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


# --- products with bits, distances -----------------------------------------------------------------------------------
def _run_embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool, out: Tensor) -> None:
    if not weight.shape[0]:  # no bits: nothing for a kernel to read
        out.zero_() if bias is None else out.copy_(bias)
    elif out.numel():
        kernel = select("embed_bits", out.device, weight.dtype)
        bias = None if bias is None else bias.contiguous()
        rows = packed.contiguous().view(out.numel() // out.shape[-1], packed.shape[-1])
        kernel(rows, weight.contiguous(), bias, signed, out.view(-1, out.shape[-1]))


define(
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


define(
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


define(
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


define(
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
    torch.library.register_autograd(f"bldm::{_name}", _backward, setup_context=_context, lib=library)
