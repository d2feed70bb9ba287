"""embed_bits: a matrix product with bits that are never unpacked in memory."""

import torch
from torch import Tensor

from .. import checks
from ..canonical import num_bytes


def embed_bits(
    packed: Tensor, weight: Tensor, bias: Tensor | None = None, *, signed: bool = True, out: Tensor | None = None
) -> Tensor:
    """(2 x - 1) @ weight + bias, or x @ weight + bias with signed=False; x the C bits of every position.

    Args:
        packed: uint8 (..., ceil(C / 8)).
        weight: (C, D) float32, float16, bfloat16 or float64.
        bias: (D,) like weight.
        out: contiguous (..., D) like weight; no gradient flows through a call with `out`.

    Returns: (..., D) in the dtype of weight, differentiable with respect to weight and bias. Sums are kept in float32.
    """
    checks.packed("packed", packed, min_dim=1)
    checks.floating("weight", weight)
    checks.same_device("weight", weight, "packed", packed)
    if weight.dim() != 2 or packed.shape[-1] != num_bytes(weight.shape[0]):
        raise ValueError(
            f"weight: expected (C, D) with ceil(C / 8) = {packed.shape[-1]}, the last dimension of packed "
            f"{tuple(packed.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.tensor("bias", bias, (weight.dtype,))
        checks.shape("bias", bias, weight.shape[1:], "the columns of weight")
        checks.same_device("bias", bias, "packed", packed)
    if out is None:
        return torch.ops.bldm.embed_bits(packed, weight, bias, signed)
    checks.out(out, (*packed.shape[:-1], weight.shape[1]), weight.dtype, "packed", packed)
    torch.ops.bldm.embed_bits_out(packed, weight, bias, signed, out=out)
    return out
