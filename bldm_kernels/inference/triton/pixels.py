"""Patches of images, and images of normalised activations: one product with all nine taps, then the sum over the neighbours."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.common import ceil_div, next_power_of_2, on_device, store_rounded
from ..group_norm import Norm
from .common import product, rounded
from .group_norm import scale_and_shift, silu

BLOCK_PIXELS, BLOCK_CHANNELS = 64, 64  # of a tile of the product
PATCH_PIXELS = 128
SUM_PIXELS = 512


@triton.jit(do_not_specialize=["height", "width"])
def patches_kernel(
    images, out, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (run of pixels, b): [BLOCK, WIDTH] values, gathered."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, BLOCK_W)[None, :]
    tap, c = k // CHANNELS, k % CHANNELS
    y, x = p // width + tap // 3 - 1, p % width + tap % 3 - 1
    inside = (p < height * width) & (tap < 9) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    values = tl.load(images + (b * CHANNELS + c) * height * width + y * width + x, inside, 0.0).to(tl.float32)
    store_rounded(out + (b * height * width + p) * WIDTH + k, values, (p < height * width) & (k < WIDTH))


@triton.jit(do_not_specialize=["pixels"])
def taps_kernel(
    x,
    statistics,
    norm_weight,
    norm_bias,
    weight,
    out,
    pixels,
    columns,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    C_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, b): normalised pixels [BLOCK_P, C] @ weight (columns, C)^T, stored as (b, columns, pixels) in float32."""
    b = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for block in tl.static_range(C_BLOCKS):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        scale, shift = scale_and_shift(statistics, norm_weight, norm_bias, b, c, c < CHANNELS, CHANNELS, GROUPS)
        exists = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        at = (b.to(tl.int64) * pixels + p)[:, None] * CHANNELS + c[None, :]
        values = tl.load(x + at, exists, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            values = silu(values)
        rows = tl.load(weight + n[None, :] * CHANNELS + c[:, None], (n < columns)[None, :] & (c < CHANNELS)[:, None], 0.0)
        if x.dtype.element_ty == tl.bfloat16:
            total = product(rounded(values, tl.bfloat16), rows, total)
        else:
            total = product(values.to(tl.float16), rows, total)
    to = out + (b.to(tl.int64) * columns + n)[None, :] * pixels + p[:, None]
    tl.store(to, total, (n < columns)[None, :] & (p < pixels)[:, None])


@triton.jit(do_not_specialize=["height", "width"])
def sum_kernel(taps, bias, out, height, width, channels, BLOCK: tl.constexpr):
    """Program (run of pixels, channel, b) of the image; taps (b, 9 channels, pixels)."""
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixels = height * width
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = p // width, p % width
    total = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + n)
    for tap in tl.static_range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        total += tl.load(taps + ((b * channels + n) * 9 + tap) * pixels + p + dy * width + dx, inside, 0.0)
    if out.dtype.element_ty == tl.uint8:
        total = (tl.minimum(tl.maximum(total, -1.0), 1.0) + 1.0) * 127.5
        total = (total + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
        tl.store(out + (b * channels + n) * pixels + p, total.to(tl.uint8), p < pixels)
    else:
        store_rounded(out + (b * channels + n) * pixels + p, total, p < pixels)


def patches(images: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    batch, channels, height, columns = images.shape
    out = torch.empty(batch, height, columns, width, dtype=dtype, device=images.device)
    options = {"CHANNELS": channels, "WIDTH": width, "BLOCK_W": next_power_of_2(width), "BLOCK": PATCH_PIXELS}
    with on_device(images):
        patches_kernel[(ceil_div(height * columns, PATCH_PIXELS), batch)](images, out, height, columns, **options)
    return out


def pixels(
    x: Tensor,
    statistics: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    batch, height, width, channels = x.shape
    out_channels, num_pixels = len(weight), height * width
    taps = torch.empty(batch, 9 * out_channels, num_pixels, device=x.device)
    out = torch.empty(batch, out_channels, height, width, dtype=dtype, device=x.device)
    depth = min(BLOCK_CHANNELS, next_power_of_2(channels))
    options = {
        "CHANNELS": channels,
        "GROUPS": norm.groups,
        "SILU": norm.silu,
        "C_BLOCKS": ceil_div(channels, depth),
        "BLOCK_P": BLOCK_PIXELS,
        "BLOCK_C": depth,
        "BLOCK_N": max(16, next_power_of_2(9 * out_channels)),
    }
    with on_device(x):
        taps_kernel[(ceil_div(num_pixels, BLOCK_PIXELS), batch)](
            x, statistics, norm.weight, norm.bias, weight, taps, num_pixels, 9 * out_channels, **options
        )
        grid = (ceil_div(num_pixels, SUM_PIXELS), out_channels, batch)
        sum_kernel[grid](taps, bias, out, height, width, out_channels, BLOCK=SUM_PIXELS)
    return out
