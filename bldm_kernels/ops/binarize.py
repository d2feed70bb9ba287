"""binarize: logits of an encoder to packed bits, and the variant a gradient passes straight through."""

import torch
from torch import Tensor

from .. import checks

MODES = ("bernoulli", "threshold")


def binarize(
    logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    mode: str | None = None,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Packed bits of logits: Bernoulli(sigmoid(l)) or l > 0 (Wang et al. 2023, eq. 3).

    Args:
        logits: the first dimension is the sample; float32, float16, bfloat16 or float64.
        seed, step, sample_offset: the draw, as in `flip_step`; needed by mode "bernoulli" only.
        mode: "bernoulli" or "threshold"; default: "bernoulli" with a seed, "threshold" without.
        dim: the channel dimension (not 0): 1 for (B, C, H, W).
        out: uint8 output to write into.

    Returns: uint8, the other dimensions in order, then ceil(C / 8): (B, C, H, W) with dim=1 gives (B, H, W, P).
    """
    checks.floating("logits", logits, min_dim=2)
    dim = checks.dimension("dim", dim, logits.dim())
    if dim == 0:
        raise ValueError("dim: expected a channel dimension, got 0 (the sample)")
    mode = checks.option("mode", mode or ("threshold" if seed is None else "bernoulli"), MODES)
    if mode == "bernoulli" and seed is None:
        raise ValueError("seed: mode 'bernoulli' needs a seed, got None")
    value, seed_tensor = checks.seed(0 if seed is None else seed, "logits", logits)
    step_value, step_tensor = checks.step(step, "logits", logits)
    offset = checks.sample_offset(sample_offset)
    arguments = (logits, dim, mode == "bernoulli", value, step_value, offset, seed_tensor, step_tensor)
    if out is None:
        return torch.ops.bldm.binarize(*arguments)
    shape = (*logits.shape[:dim], *logits.shape[dim + 1 :], (logits.shape[dim] + 7) // 8)
    checks.out(out, shape, torch.uint8, "logits", logits)
    torch.ops.bldm.binarize_out(*arguments, out=out)
    return out


def binarize_straight_through(
    logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    mode: str | None = None,
    dim: int = -1,
) -> Tensor:
    """`binarize` for training: bits 0 and 1 in the shape and dtype of the logits, with the gradient of sigmoid(logits)."""
    checks.floating("logits", logits, min_dim=2)
    draw = {"seed": seed, "step": step, "sample_offset": sample_offset, "mode": mode}
    packed = binarize(logits.detach(), dim=dim, **draw)  # type: ignore[arg-type]
    return torch.ops.bldm.straight_through(logits, packed, dim % logits.dim())
