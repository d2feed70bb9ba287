"""Between images and channels-last activations: the patches in front of the first convolution, and all behind the last norm."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .choice import triton_runs_on
from .group_norm import LOW, MAX_CHANNELS, Norm, check_activations, check_norm, plain_normalize, wide

PATCH = 9  # pixels of a 3x3 convolution


def plain_patches(images: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The specification of `patches`."""
    batch, channels, height, columns = images.shape
    unfolded = F.unfold(images.to(dtype), 3, padding=1).unflatten(1, (channels, PATCH))
    taps = unfolded.permute(0, 3, 2, 1).reshape(batch, height, columns, PATCH * channels)
    return F.pad(taps, (0, width - PATCH * channels))


def plain_pixels(x: Tensor, statistics: Tensor, norm: Norm, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The specification of `pixels`."""
    normalized = plain_normalize(x, statistics, norm).permute(0, 3, 1, 2)
    images = F.conv2d(normalized, weight.permute(0, 3, 1, 2).to(statistics.dtype), bias, padding=1)
    if dtype == torch.uint8:
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).contiguous()
    return images.to(dtype).contiguous()


def supports_patches(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel cuts patches in this dtype; PyTorch cuts the rest."""
    return dtype in LOW and triton_runs_on(device)


def supports_pixels(dtype: torch.dtype, weight: Tensor, device: torch.device) -> bool:
    """Whether the kernels take activations of this dtype and this last convolution (N, 3, 3, C); PyTorch takes the rest."""
    few = PATCH * len(weight) <= 64 and 16 <= weight.shape[-1] <= MAX_CHANNELS
    return few and dtype in LOW and triton_runs_on(device)


def patches(images: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The 3x3 neighbourhood of every pixel, zeros outside the image, as channels: a 3x3 convolution becomes a 1x1 one.

    Args:
        images: contiguous floating (B, C, H, W).
        width: channels of the result, at least 9 C; those above are zeros.
        dtype: of the result.

    Returns: (B, H, W, width), channel (3 dy + dx) C + c the pixel (dy - 1, dx - 1) away.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.floating("images", images)
    if images.dim() != 4 or not images.is_contiguous():
        raise ValueError(f"images: expected a contiguous (B, C, H, W), got shape {tuple(images.shape)}")
    checks.integer("width", width, PATCH * images.shape[1], 2**16)
    if images.numel() and supports_patches(dtype, images.device):
        from .triton import pixels as kernels

        return kernels.patches(images, width, dtype)
    return plain_patches(images, width, dtype)


def pixels(
    x: Tensor,
    statistics: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """GroupNorm (and SiLU), a 3x3 convolution to few channels, and the image.

    The kernels take every activation once, for a product with all nine taps, and add up what belongs to a pixel afterwards.

    Args:
        x: contiguous (B, H, W, C).
        statistics: (B, 2, groups), as `finish` returns them for norm.
        weight: contiguous (N, 3, 3, C) in the dtype of x. bias: (N,) in the dtype of statistics.
        dtype: of the image: floating, the values as they are; uint8, [-1, 1] as 0..255, rounded, clamped.

    Returns: contiguous (B, N, H, W).

    Raises: TypeError, ValueError for a wrong argument.
    """
    check_activations("x", x)
    check_norm(norm, x.shape[-1], x)
    checks.tensor("statistics", statistics, (wide(x.dtype),))
    checks.shape("statistics", statistics, (len(x), 2, norm.groups), "two a group")
    checks.tensor("weight", weight, (x.dtype,))
    checks.tensor("bias", bias, (statistics.dtype,))
    checks.shape("weight", weight, (len(bias), 3, 3, x.shape[-1]), "a 3x3 convolution of x")
    if dtype not in (*checks.FLOAT_DTYPES, torch.uint8):
        raise TypeError(f"dtype: expected a floating dtype or uint8, got {dtype}")
    for name, value in (("statistics", statistics), ("weight", weight), ("bias", bias)):
        checks.same_device(name, value, "x", x)
    if x.numel() and supports_pixels(x.dtype, weight, x.device):
        from .triton import pixels as kernels

        return kernels.pixels(x, statistics, norm, weight, bias, dtype)
    return plain_pixels(x, statistics, norm, weight, bias, dtype)
