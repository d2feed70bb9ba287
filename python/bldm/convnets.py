"""Convolutional encoders and decoders of the binary autoencoder: the plain pair, and the pair of taming-transformers."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: Callable[[int], nn.Module] = norm):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head attention over the positions of the grid."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = norm):
        super().__init__()
        self.norm, self.qkv, self.out = norm(channels), nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Half the grid; padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def plain_encoder(
    in_channels: int, widths: Sequence[int], num_bits: int, num_res_blocks: int, attention: bool = False
) -> nn.Sequential:
    """Images (B, in_channels, H, W) -> logits (B, num_bits, h, w); attention at the lowest resolution."""
    blocks: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            blocks.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
        blocks += [ResidualBlock(width, width) for _ in range(num_res_blocks)]
    middle = [ResidualBlock(widths[-1], widths[-1]), *([Attention(widths[-1])] if attention else [])]
    return nn.Sequential(*blocks, *middle, norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], num_bits, 1))


def plain_decoder(out_channels: int, widths: Sequence[int], num_res_blocks: int, attention: bool = False) -> nn.Sequential:
    """Embedded bits (B, widths[-1], h, w) -> images (B, out_channels, H, W)."""
    blocks: list[nn.Module] = [ResidualBlock(widths[-1], widths[-1])]
    if attention:
        blocks.append(Attention(widths[-1]))
    for level in reversed(range(len(widths))):
        above = widths[min(level + 1, len(widths) - 1)]
        blocks += [ResidualBlock(above if i == 0 else widths[level], widths[level]) for i in range(num_res_blocks)]
        if level:
            blocks.append(Upsample(widths[level]))
    return nn.Sequential(*blocks, norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1))


# The pair of taming-transformers (Esser et al. 2021), as the paper's code has it: 32 groups everywhere, attention in the middle
# and at chosen levels, and no activation in front of the last convolution.
groups_of_32: Callable[[int], nn.Module] = partial(nn.GroupNorm, 32, eps=1e-6)


def _middle(width: int) -> list[nn.Module]:
    return [
        ResidualBlock(width, width, groups_of_32),
        Attention(width, groups_of_32),
        ResidualBlock(width, width, groups_of_32),
    ]


def _level(in_width: int, width: int, num_res_blocks: int, attention: bool) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for i in range(num_res_blocks):
        blocks.append(ResidualBlock(width if i else in_width, width, groups_of_32))
        if attention:
            blocks.append(Attention(width, groups_of_32))
    return blocks


def taming_encoder(
    in_channels: int,
    base_channels: int,
    widths: Sequence[int],
    embedding_width: int,
    num_bits: int,
    num_res_blocks: int,
    attention_levels: Collection[int],
) -> nn.Sequential:
    """Images (B, in_channels, H, W) -> logits (B, num_bits, h, w)."""
    blocks: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 3, padding=1)]
    for level, width in enumerate(widths):
        blocks += _level(widths[level - 1] if level else base_channels, width, num_res_blocks, level in attention_levels)
        if level < len(widths) - 1:
            blocks.append(Downsample(width))
    out = nn.Conv2d(widths[-1], embedding_width, 3, padding=1)
    return nn.Sequential(*blocks, *_middle(widths[-1]), groups_of_32(widths[-1]), out, nn.Conv2d(embedding_width, num_bits, 1))


def taming_decoder(
    out_channels: int,
    widths: Sequence[int],
    embedding_width: int,
    num_res_blocks: int,
    attention_levels: Collection[int],
    norm_first: bool,
) -> nn.Sequential:
    """Embedded bits (B, embedding_width, h, w) -> images (B, out_channels, H, W)."""
    blocks: list[nn.Module] = [groups_of_32(embedding_width)] if norm_first else []
    blocks += [nn.Conv2d(embedding_width, widths[-1], 3, padding=1), *_middle(widths[-1])]
    for level in reversed(range(len(widths))):
        above = widths[min(level + 1, len(widths) - 1)]
        blocks += _level(above, widths[level], num_res_blocks, level in attention_levels)
        if level:
            blocks.append(Upsample(widths[level]))
    return nn.Sequential(*blocks, groups_of_32(widths[0]), nn.Conv2d(widths[0], out_channels, 3, padding=1))
