"""Self-attention behind its linear layer: values by the kernel of inference, which also leaves the logarithms of its sums, and
gradients by another, in the layout that the layer reads."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._ops import library
from ..backends.native import load_part
from ..inference import attention as inference
from ..inference.choice import triton_runs_on

TOKENS = range(256, 261)


def fits(tokens: int, width: int, num_heads: int) -> bool:
    """Whether it is worth it: the kernels take so many tokens, and heads of this width."""
    return tokens in TOKENS and width == num_heads * inference.WHOLE_HEAD_DIM


def _by_kernels(qkv: Tensor, num_heads: int) -> bool:
    return qkv.shape[1] in TOKENS and inference.takes_whole_heads(qkv, num_heads)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, heads dim) -> (B, heads, T, dim)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = F.linear(x, weight, bias)
    samples, tokens, width = x.shape
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if _by_kernels(qkv, num_heads):
        log_sums = qkv.new_empty(samples, num_heads, tokens, 1, dtype=torch.float32)
        return inference.whole_heads(qkv, num_heads, log_sums=log_sums), qkv, log_sums
    q, k, v = (_heads(part, num_heads).to(precise) for part in qkv.chunk(3, -1))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(x.dtype)
    return out, qkv, scores.logsumexp(-1, keepdim=True)


def _gradient(
    grad: Tensor, x: Tensor, weight: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if _by_kernels(qkv, num_heads):
        together, by_bias = _by_whole_heads(grad.contiguous(), qkv, out, log_sums, num_heads)
    else:
        precise = (*qkv.chunk(3, -1), grad, out)
        q, k, v, g, o = (_heads(part, num_heads).to(log_sums.dtype) for part in precise)
        scale = q.shape[-1] ** -0.5
        weights = torch.exp(q @ k.mT * scale - log_sums)
        changes = scale * weights * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        parts = (changes @ k, changes.mT @ q, weights.mT @ g)
        together = torch.stack([part.transpose(1, 2) for part in parts], 2).flatten(2)
        by_bias = together.sum((0, 1)).to(weight.dtype)
        together = together.to(qkv.dtype)
    rows = together.flatten(0, 1)
    return (rows @ weight).view(x.shape), rows.mT @ x.flatten(0, 1), by_bias


def _by_whole_heads(grad: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sum over samples and tokens."""
    together, sums = torch.empty_like(qkv), qkv.new_empty(len(qkv), 1, qkv.shape[2], dtype=torch.float32)
    pointers = (tensor.data_ptr() for tensor in (qkv, grad, out, log_sums))
    stream = torch.cuda.current_stream(qkv.device).cuda_stream
    load_part("cuda")[0].attention_gradient(  # type: ignore[union-attr]
        *pointers, *qkv.shape[:2], num_heads, together.data_ptr(), sums.data_ptr(), qkv.get_device(), stream
    )
    if not triton_runs_on(qkv.device):
        return together, sums.sum((0, 1)).to(qkv.dtype)
    from .triton.sums import sum_of_parts

    return together, sum_of_parts(sums, qkv.dtype)[0]


TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("attention(Tensor x, Tensor weight, Tensor bias, int num_heads) -> (Tensor, Tensor, Tensor)", tags=TAGS)
library.define(
    "attention_gradient(Tensor grad, Tensor x, Tensor weight, Tensor qkv, Tensor out, Tensor log_sums, int num_heads)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.impl("attention", _forward, "CompositeExplicitAutograd")
library.impl("attention_gradient", _gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("bldm::attention", lib=library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    samples, tokens, width = x.shape
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    log_sums = x.new_empty(samples, num_heads, tokens, 1, dtype=precise)
    return x.new_empty(x.shape), x.new_empty(samples, tokens, 3 * width), log_sums


@torch.library.register_fake("bldm::attention_gradient", lib=library)
def _fake_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, ctx.num_heads = inputs
    out, qkv, log_sums = output
    ctx.save_for_backward(x, weight, qkv, out, log_sums)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *torch.ops.bldm.attention_gradient(grad, *ctx.saved_tensors, ctx.num_heads), None


torch.library.register_autograd("bldm::attention", _backward, setup_context=_context, lib=library)


def attention(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q, k, v = x weight^T + bias (Vaswani et al. 2017).

    Args:
        x: (B, T, W), floating.
        weight, bias: (3 W, W) and (3 W,), in the dtype of x: of queries, keys and values of all heads behind each other.
        num_heads: a divisor of W.

    Returns: (B, T, W)
    """
    return torch.ops.bldm.attention(x.contiguous(), weight, bias, num_heads)[0]  # type: ignore[no-any-return]
