"""Self-attention behind its linear layer: values by the kernel of inference, which also leaves the logarithms of its sums; from
them gradients by cuDNN, put together as the layer reads them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._ops import library
from ..inference import attention as inference
from ..inference.choice import triton_runs_on


def fits(tokens: int, width: int, num_heads: int) -> bool:
    """Whether it is worth it: the kernel takes so many tokens, and heads of this width."""
    return tokens in inference.WHOLE_HEAD_TOKENS and width == num_heads * inference.WHOLE_HEAD_DIM


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, heads dim) -> (B, heads, T, dim)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _by_kernels(qkv: Tensor, num_heads: int) -> bool:
    return inference.takes_whole_heads(qkv, num_heads) and torch.backends.cudnn.is_available()


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
    q, k, v = (_heads(part, num_heads) for part in qkv.chunk(3, -1))
    g, o, scale = _heads(grad.contiguous(), num_heads), _heads(out, num_heads), q.shape[-1] ** -0.5
    if _by_kernels(qkv, num_heads):
        seed, tokens = torch.zeros((), dtype=torch.int64, device=qkv.device), x.shape[1]  # of a dropout that there is not
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        parts = cudnn(g, q, k, v, o, log_sums, seed, seed, None, None, None, tokens, tokens, 0.0, False, scale=scale)
    else:
        q, k, v, g, o = (part.to(log_sums.dtype) for part in (q, k, v, g, o))
        weights = torch.exp(q @ k.mT * scale - log_sums)
        changes = scale * weights * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        parts = tuple(part.to(qkv.dtype) for part in (changes @ k, changes.mT @ q, weights.mT @ g))
    parts = tuple(part.transpose(1, 2).contiguous() for part in parts)
    if triton_runs_on(qkv.device):
        from .triton import attention as kernels

        together, by_bias = kernels.join(*parts)
    else:
        together = torch.stack(parts, 2).flatten(2)
        by_bias = together.flatten(0, 1).sum(0)
    rows = together.flatten(0, 1)
    return (rows @ weight).view(x.shape), rows.mT @ x.flatten(0, 1), by_bias.to(weight.dtype)


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
