"""The token buffer of a step, written in place: embedded bits with their positions, then the tokens of time and condition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, reference
from ..canonical import num_bytes
from .choice import triton_runs_on


def plain(packed: Tensor, weight: Tensor, positions: Tensor, extra_tokens: Sequence[Tensor], out: Tensor) -> None:
    """The specification."""
    samples, places = len(out), packed.shape[1]
    tokens = reference.embed_bits(packed, weight.float(), None, True) + positions
    out.unflatten(0, (-1, len(packed)))[:, :, :places] = tokens.to(out.dtype)
    for row, token in enumerate(extra_tokens, places):
        out[:, row] = token.expand(samples, -1).to(out.dtype)


def supports(out: Tensor, num_extra: int) -> bool:
    """Whether the kernel takes bfloat16 `out` (B, T, W): with one or two extra tokens."""
    fits = out.dtype == torch.bfloat16 and 1 <= num_extra <= 2
    return fits and out.numel() > 0 and triton_runs_on(out.device)


def embed_tokens(
    packed: Tensor,
    weight: Tensor,
    positions: Tensor,
    extra_tokens: Sequence[Tensor],
    out: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """out[b, n] = (2 x - 1) @ weight + positions[n] for the N positions of sample b, and the extra tokens in the rows after them.

    Args:
        packed: uint8 (R, N, ceil(C / 8)), B a multiple of R: sample b has the bits of row b mod R, so that the two halves of a
            guided batch share theirs.
        weight: (C, W) in the dtype of out.
        positions: float32 (N, W), the embedding's bias already added.
        extra_tokens: tensors (1, W), the same for all samples, or (B, W), in the dtype of out: token N, N + 1, ...
        out: contiguous (B, T, W), T = N + len(extra_tokens); bfloat16 for the kernel.
        pdl: as in `attention`.

    Returns: out.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.packed("packed", packed)
    checks.floating("out", out)
    checks.tensor("weight", weight, (out.dtype,))
    checks.tensor("positions", positions, (torch.float32,))
    if out.dim() != 3 or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous (B, T, W), got shape {tuple(out.shape)} with strides {out.stride()}")
    samples, tokens, width = out.shape
    if weight.dim() != 2 or weight.shape[1] != width or packed.shape[-1] != num_bytes(weight.shape[0]):
        raise ValueError(
            f"weight: expected (C, {width}) with ceil(C / 8) = {packed.shape[-1]}, the last dimension of packed "
            f"{tuple(packed.shape)}, got {tuple(weight.shape)}"
        )
    if packed.dim() != 3 or len(packed) == 0 or samples % len(packed) or packed.shape[1] + len(extra_tokens) != tokens:
        raise ValueError(
            f"packed: expected (R, N, P), R a divisor of {samples} and N = {tokens - len(extra_tokens)}, for out "
            f"{tuple(out.shape)} with {len(extra_tokens)} extra tokens, got shape {tuple(packed.shape)}"
        )
    checks.shape("positions", positions, (packed.shape[1], width))
    for i, token in enumerate(extra_tokens):
        checks.tensor(f"extra_tokens[{i}]", token, (out.dtype,))
        if tuple(token.shape) not in ((1, width), (samples, width)):
            raise ValueError(f"extra_tokens[{i}]: expected (1, {width}) or ({samples}, {width}), got {tuple(token.shape)}")
    named = {"packed": packed, "weight": weight, "positions": positions}
    for name, value in {**named, **{f"extra_tokens[{i}]": token for i, token in enumerate(extra_tokens)}}.items():
        checks.same_device(name, value, "out", out)
    if supports(out, len(extra_tokens)):
        from .triton import embed as kernels

        extra = [token.contiguous() for token in extra_tokens]
        kernels.embed_tokens(packed.contiguous(), weight.contiguous(), positions.contiguous(), extra, out, pdl)
        return out
    plain(packed, weight, positions, extra_tokens, out)
    return out
