"""Packed bits: pack_bits, unpack_bits, random_bits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..canonical import num_bytes

PACKABLE = (
    *checks.FLOAT_DTYPES,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def pack_bits(x: Tensor, dim: int = -1, *, out: Tensor | None = None) -> Tensor:
    """Pack the channels along `dim` into bytes, which become the last dimension.

    Exactly `numpy.packbits(x.movedim(dim, -1), axis=-1, bitorder="little")`: any nonzero is a one, bit j of byte i is channel
    8 i + j, padding bits are 0. A (B, C, H, W) tensor with dim=1 becomes (B, H, W, ceil(C / 8)) in one pass over memory.

    Args:
        x: any shape with at least one dimension; bool, integer or floating.
        dim: the channel dimension.
        out: uint8 output to write into.

    Raises: TypeError for another dtype, ValueError for a dim out of range or a wrong `out`.
    """
    checks.tensor("x", x, PACKABLE, min_dim=1)
    dim = checks.dimension("dim", dim, x.dim())
    if out is None:
        return torch.ops.bldm.pack_bits(x, dim)
    checks.out(out, (*x.shape[:dim], *x.shape[dim + 1 :], num_bytes(x.shape[dim])), torch.uint8, "x", x)
    torch.ops.bldm.pack_bits_out(x, dim, out=out)
    return out


def unpack_bits(
    packed: Tensor, num_bits: int, dtype: torch.dtype = torch.float32, *, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """The inverse of `pack_bits`: `num_bits` channels of 0 and 1, placed at dimension `dim` of the result.

    Args:
        packed: uint8 (..., ceil(num_bits / 8)).
        num_bits: number of channels C.
        dtype: dtype of the result (bool, integer or floating).
        dim: where the channels go: -1 gives (..., C); 1 turns (B, H, W, P) into (B, C, H, W) in one pass.
        out: contiguous output to write into; its dtype must be `dtype`.

    Raises: TypeError for a wrong dtype, ValueError if the last dimension does not hold `num_bits` bits.
    """
    checks.packed("packed", packed, min_dim=1)
    if dtype not in PACKABLE:
        raise TypeError(f"dtype: expected a bool, integer or floating dtype, got {dtype}")
    num_bits = checks.integer("num_bits", num_bits, 0, 2**31 - 1)
    if packed.shape[-1] != num_bytes(num_bits):
        raise ValueError(
            f"num_bits: {num_bits} bits take {num_bytes(num_bits)} bytes, but packed has shape {tuple(packed.shape)}"
        )
    dim = checks.dimension("dim", dim, packed.dim())
    if out is None:
        return torch.ops.bldm.unpack_bits(packed, num_bits, dtype, dim)
    shape = list(packed.shape[:-1])
    shape.insert(dim, num_bits)
    checks.out(out, shape, dtype, "packed", packed)
    torch.ops.bldm.unpack_bits_out(packed, num_bits, dtype, dim, out=out)
    return out


def random_bits(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_offset: int = 0,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Packed fair coin flips: the state x_T every reverse process starts from.

    Args:
        num_samples: B.
        shape: bits of one sample, channels last, for example (N, C) or (H, W, C).
        seed: 64-bit seed, an int or a one-element int64 tensor on `device`.
        sample_offset: index of the first sample; sample i of the batch draws as sample `sample_offset + i`.
        device: where to make them (default: the device of `out`, else the CPU).
        out: uint8 output to write into.

    Returns: uint8 (B, *shape[:-1], ceil(shape[-1] / 8)).
    """
    num_samples = checks.integer("num_samples", num_samples, 0, 2**40)
    if len(shape) < 1:
        raise ValueError("shape: expected at least the number of channels, got ()")
    sizes = [checks.integer("shape", size, 0, 2**31 - 1) for size in shape]
    packed_shape = (num_samples, *sizes[:-1], num_bytes(sizes[-1]))
    if math.prod(packed_shape[1:]) >= 2**32:
        raise ValueError(f"shape: expected less than 2^32 packed bytes a sample, got {tuple(shape)}")
    sample_offset = checks.sample_offset(sample_offset)
    if out is None:
        out = torch.empty(packed_shape, dtype=torch.uint8, device=device)
    elif device is not None and torch.device(device).type != out.device.type:
        raise ValueError(f"device: expected {out.device} like out, got {device}")
    checks.out(out, packed_shape, torch.uint8, "out", out)
    value, seed_tensor = checks.seed(seed, "out", out)
    torch.ops.bldm.random_bits_out(sizes[-1], value, sample_offset, seed_tensor, out=out)
    return out
