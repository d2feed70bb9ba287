"""BinaryAutoencoder: images to a grid of bits and back (Wang et al. 2023, section 3.1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

from .checkpoint import PretrainedModel


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head attention over the positions of the grid."""

    def __init__(self, channels: int):
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


class BinaryAutoencoder(nn.Module, PretrainedModel):
    """Convolutional autoencoder with a bottleneck of bits.

    Args:
        image_size: height and width, divisible by 2^(levels - 1).
        in_channels: channels of an image.
        num_bits: C, bits at each position of the grid.
        base_channels: width of the first level (divisible by 4).
        channel_multipliers: width of each level relative to it; every level after the first halves the grid.
        num_res_blocks: residual blocks a level.
        attention: attention at the lowest resolution.
        mode: bits in training: "bernoulli" draws them from sigmoid(logits), "threshold" takes logits > 0.

    Attributes: `latent_shape` (h, w, C).
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        num_bits: int = 32,
        base_channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 2),
        num_res_blocks: int = 1,
        attention: bool = False,
        mode: str = "bernoulli",
    ):
        super().__init__()
        bk.checks.integer("image_size", image_size, 1, 2**16)
        bk.checks.integer("in_channels", in_channels, 1, 2**16)
        bk.checks.integer("num_bits", num_bits, 1, 2**16)
        bk.checks.integer("num_res_blocks", num_res_blocks, 1, 2**10)
        bk.checks.option("mode", mode, ("bernoulli", "threshold"))
        if bk.checks.integer("base_channels", base_channels, 4, 2**16) % 4:
            raise ValueError(f"base_channels: expected a multiple of 4, got {base_channels}")
        if not channel_multipliers or any(bk.checks.integer("channel_multipliers", m, 0, 2**10) < 1 for m in channel_multipliers):
            raise ValueError(f"channel_multipliers: expected one integer >= 1 a level, got {list(channel_multipliers)}")
        scale = 2 ** (len(channel_multipliers) - 1)
        if image_size % scale:
            raise ValueError(
                f"image_size: expected a multiple of {scale} for {len(channel_multipliers)} levels, got {image_size}"
            )
        self.image_size, self.in_channels, self.mode = image_size, in_channels, mode
        self.latent_shape = (image_size // scale, image_size // scale, num_bits)
        widths = [base_channels * m for m in channel_multipliers]

        encoder: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                encoder.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            encoder += [ResidualBlock(width, width) for _ in range(num_res_blocks)]
        middle = [ResidualBlock(widths[-1], widths[-1]), *([Attention(widths[-1])] if attention else [])]
        self.encoder = nn.Sequential(*encoder, *middle, norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], num_bits, 1))

        self.embedding = nn.Parameter(torch.randn(num_bits, widths[-1]) * num_bits**-0.5)
        decoder: list[nn.Module] = [ResidualBlock(widths[-1], widths[-1])]
        if attention:
            decoder.append(Attention(widths[-1]))
        for level in reversed(range(len(widths))):
            above = widths[min(level + 1, len(widths) - 1)]
            decoder += [ResidualBlock(above if i == 0 else widths[level], widths[level]) for i in range(num_res_blocks)]
            if level:
                decoder.append(Upsample(widths[level]))
        self.decoder = nn.Sequential(*decoder, norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], in_channels, 3, padding=1))

    def encode_logits(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> logits (B, C, h, w) of each bit being 1."""
        bk.checks.floating("images", images)
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        return self.encoder(images)

    @torch.no_grad()
    def encode(self, images: Tensor, *, seed: int | None = None, sample_offset: int = 0) -> Tensor:
        """Packed bits uint8 (B, h, w, P): thresholded without a seed, Bernoulli with one."""
        return bk.binarize(self.encode_logits(images), seed=seed, sample_offset=sample_offset, dim=1)

    def decode(self, packed: Tensor) -> Tensor:
        """Packed bits (B, h, w, P) -> images (B, in_channels, H, W), about in [-1, 1]."""
        height, width, num_bits = self.latent_shape
        bk.checks.packed("packed", packed)
        bk.checks.shape(
            "packed", packed, (len(packed), height, width, (num_bits + 7) // 8), f"latents of {self.latent_shape} bits"
        )
        return self.decoder(bk.embed_bits(packed, self.embedding).permute(0, 3, 1, 2))

    def forward(self, images: Tensor, *, seed: int | Tensor = 0, step: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """(reconstruction, logits) for training: the gradient passes straight through the bits."""
        logits = self.encode_logits(images)
        draw = {"seed": seed, "step": step} if self.mode == "bernoulli" else {}
        bits = bk.binarize_straight_through(logits, mode=self.mode, dim=1, **draw)  # type: ignore[arg-type]
        embedded = torch.einsum("bchw,cd->bdhw", 2 * bits - 1, self.embedding)
        return self.decoder(embedded), logits
