"""What follows a convolution: bias, residual, and the GroupNorm (Wu & He 2018) behind them with its SiLU, channels last.

One launch: its first programs add up and take the statistics of a sample, later ones normalise it while the caches still have it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from .choice import triton_runs_on

LOW = (torch.bfloat16, torch.float16)  # dtypes of activations that the kernels take
MAX_CHANNELS = 2048  # of a kernel, which holds all channels of a pixel at once
# Where the result of pixel (y, x) is in what a convolution wrote: there; in the channels of its parity, 4 N in all, at
# ((y + 1) / 2, (x + 1) / 2) of a grid of half the size and one more; at (y + 1, x + 1) of a grid that is larger by one.
PLAIN, UPSAMPLED, SHIFTED = 0, 1, 2


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Norm:
    """GroupNorm, and SiLU or not. weight, bias: (C,) float32 (float64 for activations in float64). groups: a power of two."""

    groups: int
    eps: float
    weight: Tensor
    bias: Tensor
    silu: bool

    @classmethod
    def of(cls, module: nn.GroupNorm, dtype: torch.dtype, *, silu: bool) -> "Norm":
        """Copies the parameters of a module, for activations of `dtype`."""
        weight, bias = (value.detach().to(wide(dtype), copy=True) for value in (module.weight, module.bias))
        return cls(module.num_groups, module.eps, weight, bias, silu)


def plain_normalize(x: Tensor, statistics: Tensor, norm: Norm) -> Tensor:
    """(x - mean) / deviation * weight + bias, and SiLU, in the dtype of the statistics; x (B, H, W, C)."""
    mean, scale = statistics.repeat_interleave(x.shape[-1] // norm.groups, dim=-1)[:, :, None, None].unbind(1)
    y = (x - mean) * scale * norm.weight + norm.bias
    return F.silu(y) if norm.silu else y


def plain_statistics(x: Tensor, norm: Norm) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of the groups of (B, H, W, C): (B, 2, groups)."""
    variance, mean = torch.var_mean(x.flatten(1, 2).unflatten(-1, (norm.groups, -1)), dim=(1, 3), correction=0)
    return torch.stack([mean, (variance + norm.eps).rsqrt()], dim=1)


def plain(raw: Tensor, bias: Tensor | None, residual: Tensor | None, source: int) -> Tensor:
    """The specification of the sum: (B, H, W, C), not rounded."""
    x = raw.to(wide(raw.dtype))
    if source == SHIFTED:
        x = x[:, 1:, 1:]
    elif source == UPSAMPLED:
        height, width = x.shape[1] - 1, x.shape[2] - 1
        x = x.unflatten(-1, (2, 2, -1))
        rows = [torch.stack([x[:, py : py + height, px : px + width, py, px] for px in range(2)], dim=3) for py in range(2)]
        x = torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2)
    x = x if bias is None else x + bias
    return x if residual is None else x + residual


def supports(dtype: torch.dtype, channels: int, device: torch.device) -> bool:
    """Whether the kernel takes activations of this dtype and width; PyTorch takes the rest."""
    return dtype in LOW and channels <= MAX_CHANNELS and triton_runs_on(device)


def counters_needed(batch: int) -> int:
    return 1 + 3 * batch


def finish(
    raw: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    *,
    source: int = PLAIN,
    keep: bool = True,
    apply: bool = True,
    counters: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """raw + bias + residual, and the norm of that.

    Args:
        raw: contiguous (B, H', W', N), as `convolve` returns it; bfloat16 or float16 for the kernel, any floating dtype in plain
            PyTorch.
        bias: (C,) float32 (float64 for float64). residual: contiguous (B, H, W, C) like raw.
        norm: the GroupNorm behind. source: which pixels of raw are meant, PLAIN, UPSAMPLED or SHIFTED.
        keep: whether the sum is wanted. apply: whether the norm is, or else only its statistics.
        counters: int32, `counters_needed(B)` of them or more, all zero, and zero again afterwards: how the programs of a kernel
            learn of each other. Nothing else may use them meanwhile. Only the kernel needs them, for a norm.

    Returns: the sum (B, H, W, C) or None; the normalised sum, like it, or the statistics (B, 2, groups): mean and
        1 / sqrt(variance + eps), or None without a norm. Statistics are those of the sum before it is rounded.

    Raises: TypeError, ValueError for a wrong argument.
    """
    shape = _check(raw, bias, residual, source)
    if norm is not None:
        check_norm(norm, shape[-1], raw)
    elif not keep:
        raise ValueError("keep: expected True without a norm, got False")
    if raw.numel() and supports(raw.dtype, shape[-1], raw.device):
        from .triton import group_norm as kernels

        if norm is not None:
            _check_counters(counters, raw)
        return kernels.finish(raw, bias, residual, norm, source, keep, apply, shape, counters)
    total = plain(raw, bias, residual, source)
    kept = total.to(raw.dtype).contiguous() if keep else None
    if norm is None:
        return kept, None
    statistics = plain_statistics(total, norm)
    return kept, plain_normalize(total, statistics, norm).to(raw.dtype).contiguous() if apply else statistics


def check_activations(name: str, x: Tensor) -> None:
    checks.floating(name, x)
    if x.dim() != 4 or not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous (B, H, W, C), got shape {tuple(x.shape)} with strides {x.stride()}")


def check_norm(norm: Norm, channels: int, x: Tensor) -> None:
    checks.integer("norm.groups", norm.groups, 1, 2**10)
    if channels % norm.groups or norm.groups & (norm.groups - 1):
        raise ValueError(f"norm.groups: expected a power of two that divides {channels} channels, got {norm.groups}")
    for name, value in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        checks.tensor(name, value, (wide(x.dtype),))
        checks.shape(name, value, (channels,), "the channels")
        checks.same_device(name, value, "the activations", x)


def _check(raw: Tensor, bias: Tensor | None, residual: Tensor | None, source: int) -> tuple[int, ...]:
    """The shape of the sum."""
    check_activations("raw", raw)
    batch, height, width, channels = raw.shape
    if source == UPSAMPLED and (channels % 4 or height < 2 or width < 2):
        raise ValueError(f"raw: expected (B, H + 1, W + 1, 4 C) of an upsampling, got shape {tuple(raw.shape)}")
    shapes = {
        PLAIN: (batch, height, width, channels),
        UPSAMPLED: (batch, 2 * (height - 1), 2 * (width - 1), channels // 4),
        SHIFTED: (batch, height - 1, width - 1, channels),
    }
    if source not in shapes:
        raise ValueError(f"source: expected PLAIN, UPSAMPLED or SHIFTED, got {source!r}")
    shape = shapes[source]
    if bias is not None:
        checks.tensor("bias", bias, (wide(raw.dtype),))
        checks.shape("bias", bias, shape[-1:], "the channels")
        checks.same_device("bias", bias, "raw", raw)
    if residual is not None:
        checks.tensor("residual", residual, (raw.dtype,))
        check_activations("residual", residual)
        checks.shape("residual", residual, shape, "the sum")
        checks.same_device("residual", residual, "raw", raw)
    return shape


def _check_counters(counters: Tensor | None, raw: Tensor) -> None:
    if counters is None:
        raise ValueError("counters: expected a tensor, which the kernel needs, got None")
    checks.tensor("counters", counters, (torch.int32,))
    checks.same_device("counters", counters, "raw", raw)
    if counters.numel() < counters_needed(len(raw)):
        raise ValueError(f"counters: expected {counters_needed(len(raw))} or more, got shape {tuple(counters.shape)}")
