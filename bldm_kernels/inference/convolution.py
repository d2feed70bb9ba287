"""Convolutions of channels-last activations by PyTorch's libraries, in the form that is fastest there; `finish` reads the result.

A nearest upsampling by two in front of a 3x3 convolution is part of the filter: every pixel of the upsampled grid sees only
2x2 pixels of the small one, so the same result takes four 2x2 convolutions, one a parity of row and column, with the weights
that met the same pixel added up: 16 products a pixel of the small grid instead of 36. They run as one, with four times the
channels. A convolution of stride 2 that is padded on one side only runs with padding 2 and a first row and column too many.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from .group_norm import PLAIN, SHIFTED, UPSAMPLED, check_activations, wide

SEEN = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))  # rows of a 3x3 filter that meet the same row, by parity


@dataclass(frozen=True)
class Filter:
    """A prepared convolution, without the sum of its bias; `of` makes one of an nn.Conv2d.

    weight: (N, C, taps, taps), channels last. bias: (N,) in float32 or float64. source: where `finish` finds a pixel's result.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    source: int = PLAIN

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype, *, upsampled: bool = False, padded_after: bool = False) -> "Filter":
        """Weights rounded to `dtype`.

        Args:
            upsampled: nearest upsampling by two in front of it, which a 3x3 convolution with padding 1 may have.
            padded_after: one row and one column of zeros behind the image, which a 3x3 convolution of stride 2 may have.

        Raises: ValueError for anything but a square convolution with one stride, one group, no dilation and zeros around.
        """
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        known = isinstance(conv.padding, tuple) and all(size[0] == size[1] for size in shape)
        if not known or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise ValueError(f"conv: expected a plain square convolution, got {conv}")
        taps, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        weight, source = conv.weight.detach(), PLAIN
        if upsampled:
            if (taps, stride, padding) != (3, 1, 1):
                raise ValueError(f"conv: expected a 3x3 convolution with padding 1 behind an upsampling, got {conv}")
            weight, source = upsampling_weight(weight.double()), UPSAMPLED
        if padded_after:
            if (taps, stride, padding) != (3, 2, 0):
                raise ValueError(f"conv: expected a 3x3 convolution of stride 2 without padding, got {conv}")
            padding, source = 2, SHIFTED
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        weight = weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
        return cls(weight, bias.to(wide(dtype), copy=True), stride, padding, source)


def upsampling_weight(weight: Tensor) -> Tensor:
    """(N, C, 3, 3) -> (4 N, C, 2, 2): what the pixels of each parity (0, 0), (0, 1), (1, 0), (1, 1) see of the small grid."""
    parities = []
    for rows in SEEN:
        halves = torch.stack([weight[:, :, seen].sum(2) for seen in rows], dim=2)
        parities += [torch.stack([halves[..., seen].sum(3) for seen in columns], dim=3) for columns in SEEN]
    return torch.cat(parities)


def convolve(x: Tensor, filter: Filter) -> Tensor:
    """The convolution without its bias, as `finish` takes it.

    Args:
        x: contiguous (B, H, W, C).
        filter: in the dtype of x.

    Returns: contiguous (B, H', W', N), UPSAMPLED (B, H + 1, W + 1, 4 N), SHIFTED (B, H / 2 + 1, W / 2 + 1, N).

    Raises: TypeError, ValueError for a wrong argument.
    """
    check_activations("x", x)
    weight = checks.tensor("filter.weight", filter.weight, (x.dtype,))
    checks.same_device("filter.weight", weight, "x", x)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} channels, got shape {tuple(x.shape)}")
    if weight.shape[2:] == (1, 1) and filter.stride == 1:
        return F.linear(x, weight[:, :, 0, 0])
    padding = 1 if filter.source == UPSAMPLED else filter.padding
    return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=filter.stride, padding=padding).permute(0, 2, 3, 1).contiguous()
