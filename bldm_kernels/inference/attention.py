"""Attention of a transformer layer: from the layout the qkv product wrote to the one the next product reads.

softmax(q k^T / sqrt(d)) v over the T tokens of every sample and head (Vaswani et al. 2017), without a copy in between.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks, dispatch
from ..backends.native import load_part
from .choice import triton_runs_on

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
HEAD_DIMS = (32, 64, 128)  # others would waste the tensor cores
# What csrc/cuda/attention.cu takes: all keys of a head in shared memory, all scores of a query in registers. A block has a head
# or two at a time, so for few of them Triton's smaller tiles fill the GPU better.
WHOLE_HEAD_DIM, WHOLE_HEAD_TOKENS, MANY_WHOLE_HEADS = 64, range(256, 273), 192


def plain(q: Tensor, k: Tensor, v: Tensor, num_heads: int, key_mask: Tensor | None, out_scale: Tensor | None) -> Tensor:
    """The specification: q (B, T, W), k and v (B, L, W) -> (B, T, W)."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return mixed if out_scale is None else to_e4m3(mixed, out_scale)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, saturated: x is about scale times the result."""
    return (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def supports(qkv: Tensor, num_heads: int) -> bool:
    """Whether the kernel takes this input; PyTorch's scaled_dot_product_attention takes the rest."""
    dim = qkv.shape[-1] // (3 * num_heads)
    return qkv.dtype == torch.bfloat16 and dim in HEAD_DIMS and qkv.numel() > 0 and triton_runs_on(qkv.device)


def supports_whole_heads(qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> bool:
    """Whether the CUDA kernel for a few more than 256 tokens takes this input, and is the faster one."""
    return key_mask is None and len(qkv) * num_heads >= MANY_WHOLE_HEADS and takes_whole_heads(qkv, num_heads)


def takes_whole_heads(qkv: Tensor, num_heads: int) -> bool:
    if qkv.shape[1] not in WHOLE_HEAD_TOKENS or qkv.shape[2] != 3 * num_heads * WHOLE_HEAD_DIM or not len(qkv):
        return False
    if not qkv.is_cuda or qkv.dtype != torch.bfloat16 or qkv.data_ptr() % 16:
        return False
    if dispatch.forced_backend() not in (None, "cuda") or not hasattr(load_part("cuda")[0], "attention"):
        return False
    return torch.cuda.get_device_capability(qkv.device) == (9, 0)


def whole_heads(
    qkv: Tensor, num_heads: int, out_scale: Tensor | None = None, log_sums: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """`attention` by the CUDA kernel of whole heads, which also fills log_sums, float32 (B, heads, T): the natural logarithms
    of the sums of exponentials."""
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype if out_scale is None else E4M3)
    scale, sums = (0 if x is None else x.data_ptr() for x in (out_scale, log_sums))
    stream = torch.cuda.current_stream(qkv.device).cuda_stream
    native: Any = load_part("cuda")[0]
    native.attention(qkv.data_ptr(), *qkv.shape[:2], num_heads, scale, out.data_ptr(), sums, pdl, qkv.get_device(), stream)
    return out


def attention(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, out_scale: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """Self-attention of (B, T, 3 W): q, k, v of all heads behind each other, W = num_heads * d.

    Args:
        qkv: contiguous (B, T, 3 W), bfloat16 for the kernel, any floating dtype in plain PyTorch.
        num_heads: heads, a divisor of W.
        key_mask: bool (B, T), False: nobody attends to this token. At least one of every sample is True.
        out_scale: one-element float32 tensor: write e4m3, the result divided by it (saturated at 448), so it is the
            `scale_a` of a product that reads the output.
        pdl: programmatic dependent launch: the kernel may start while its predecessor in the stream ends; it waits for that
            before it reads, and lets its own successor start early. Only where the kernel runs.

    Returns: contiguous (B, T, W), in the dtype of qkv or e4m3.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.floating("qkv", qkv)
    checks.integer("num_heads", num_heads, 1, 2**16)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads) or not qkv.is_contiguous():
        raise ValueError(
            f"qkv: expected a contiguous (B, T, 3 W), W a multiple of num_heads = {num_heads}, got shape {tuple(qkv.shape)} "
            f"with strides {qkv.stride()}"
        )
    _check_common(qkv, "qkv", qkv.shape[:2], key_mask, out_scale)
    if supports_whole_heads(qkv, num_heads, key_mask):
        return whole_heads(qkv, num_heads, out_scale, pdl=pdl)
    if supports(qkv, num_heads):
        from .triton import attention as kernels

        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype if out_scale is None else E4M3)
        kernels.attention(qkv, num_heads, key_mask, out_scale, pdl, out)
        return out
    q, k, v = qkv.chunk(3, dim=-1)
    return plain(q, k, v, num_heads, key_mask, out_scale)


def cross_attention(
    q: Tensor, kv: Tensor, num_heads: int, key_mask: Tensor | None = None, out_scale: Tensor | None = None
) -> Tensor:
    """Attention of q (B, T, W) to kv (B, L, 2 W), keys and values computed before; PyTorch's kernels.

    Arguments as in `attention`, key_mask bool (B, L). Returns (B, T, W), in the dtype of q or e4m3.
    """
    checks.floating("q", q)
    checks.integer("num_heads", num_heads, 1, 2**16)
    if q.dim() != 3 or q.shape[-1] % num_heads:
        raise ValueError(f"q: expected (B, T, W), W a multiple of num_heads = {num_heads}, got shape {tuple(q.shape)}")
    checks.tensor("kv", kv, (q.dtype,))
    checks.same_device("kv", kv, "q", q)
    if kv.dim() != 3 or kv.shape[0] != q.shape[0] or kv.shape[-1] != 2 * q.shape[-1]:
        raise ValueError(f"kv: expected ({q.shape[0]}, L, {2 * q.shape[-1]}) for q {tuple(q.shape)}, got {tuple(kv.shape)}")
    _check_common(q, "q", kv.shape[:2], key_mask, out_scale)
    k, v = kv.chunk(2, dim=-1)
    return plain(q, k, v, num_heads, key_mask, out_scale)


def _check_common(x: Tensor, name: str, keys: torch.Size, key_mask: Tensor | None, out_scale: Tensor | None) -> None:
    if key_mask is not None:
        checks.tensor("key_mask", key_mask, (torch.bool,))
        checks.shape("key_mask", key_mask, keys, "one a key")
        checks.same_device("key_mask", key_mask, name, x)
    check_scale(out_scale, name, x)


def check_scale(out_scale: Tensor | None, name: str, x: Tensor) -> None:
    if out_scale is not None:
        checks.tensor("out_scale", out_scale, (torch.float32,))
        checks.same_device("out_scale", out_scale, name, x)
        if out_scale.numel() != 1:
            raise ValueError(f"out_scale: expected one element, got shape {tuple(out_scale.shape)}")
