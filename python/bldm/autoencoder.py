"""BinaryAutoencoder: images to a grid of bits and back (Wang et al. 2023, section 3.1)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

from .checkpoint import PretrainedModel
from .convnets import plain_decoder, plain_encoder, taming_decoder, taming_encoder
from .parts import part

if TYPE_CHECKING:
    from .engine.autoencoder import AutoencoderEngine


class BinaryAutoencoder(nn.Module, PretrainedModel):
    """Convolutional autoencoder with a bottleneck of bits.

    Args:
        image_size: height and width, divisible by 2^(levels - 1).
        in_channels: channels of an image.
        num_bits: C, bits at each position of the grid.
        base_channels: width of the first level (divisible by 4).
        channel_multipliers: width of each level relative to it; every level after the first halves the grid.
        num_res_blocks: residual blocks a level.
        attention: attention at the lowest resolution (plain architecture; the other one always has it).
        mode: bits in training: "bernoulli" draws them from sigmoid(logits), "threshold" takes logits > 0.
        architecture: "plain", or "taming": the encoder and decoder of VQGAN (Esser et al. 2021), as in the paper's own code.
        decoder_res_blocks: residual blocks a level of the decoder (default: as in the encoder).
        signed: bits are embedded as -1 and 1, else as 0 and 1.
        attention_levels: taming: levels (0 is the full resolution) with attention after every residual block.
        embedding_width: taming: channels of an embedded bit grid (default: those of the last level).
        norm_first: taming: the decoder begins with a GroupNorm.

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
        architecture: str = "plain",
        decoder_res_blocks: int | None = None,
        signed: bool = True,
        attention_levels: Sequence[int] = (),
        embedding_width: int | None = None,
        norm_first: bool = False,
    ):
        super().__init__()
        bk.checks.integer("image_size", image_size, 1, 2**16)
        bk.checks.integer("in_channels", in_channels, 1, 2**16)
        bk.checks.integer("num_bits", num_bits, 1, 2**16)
        bk.checks.integer("num_res_blocks", num_res_blocks, 1, 2**10)
        decoder_res_blocks = num_res_blocks if decoder_res_blocks is None else decoder_res_blocks
        bk.checks.integer("decoder_res_blocks", decoder_res_blocks, 1, 2**10)
        bk.checks.option("mode", mode, ("bernoulli", "threshold"))
        bk.checks.option("architecture", architecture, ("plain", "taming"))
        if bk.checks.integer("base_channels", base_channels, 4, 2**16) % 4:
            raise ValueError(f"base_channels: expected a multiple of 4, got {base_channels}")
        if not channel_multipliers or any(bk.checks.integer("channel_multipliers", m, 0, 2**10) < 1 for m in channel_multipliers):
            raise ValueError(f"channel_multipliers: expected one integer >= 1 a level, got {list(channel_multipliers)}")
        scale = 2 ** (len(channel_multipliers) - 1)
        if image_size % scale:
            raise ValueError(
                f"image_size: expected a multiple of {scale} for {len(channel_multipliers)} levels, got {image_size}"
            )
        self.image_size, self.in_channels, self.mode, self.signed = image_size, in_channels, mode, signed
        self.latent_shape = (image_size // scale, image_size // scale, num_bits)
        widths = [base_channels * m for m in channel_multipliers]
        if architecture == "plain":
            others = {"attention_levels": attention_levels, "embedding_width": embedding_width, "norm_first": norm_first}
            for name, given in others.items():
                if given:
                    raise ValueError(f"{name}: only architecture 'taming' takes it, got {given!r} with 'plain'")
            self.encoder = plain_encoder(in_channels, widths, num_bits, num_res_blocks, attention)
            self.embedding = nn.Parameter(torch.randn(num_bits, widths[-1]) * num_bits**-0.5)
            self.decoder = plain_decoder(in_channels, widths, decoder_res_blocks, attention)
        else:
            embedding_width = widths[-1] if embedding_width is None else embedding_width
            levels = [bk.checks.integer("attention_levels", level, 0, len(widths) - 1) for level in attention_levels]
            for name, width in (("base_channels", base_channels), ("embedding_width", embedding_width)):
                if bk.checks.integer(name, width, 32, 2**16) % 32:
                    raise ValueError(f"{name}: expected a multiple of 32 for architecture 'taming', got {width}")
            self.encoder = taming_encoder(in_channels, base_channels, widths, embedding_width, num_bits, num_res_blocks, levels)
            self.embedding = nn.Parameter(torch.randn(num_bits, embedding_width) * num_bits**-0.5)
            self.decoder = taming_decoder(in_channels, widths, embedding_width, decoder_res_blocks, levels, norm_first)

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
        with part("embed"):
            embedded = bk.embed_bits(packed, self.embedding, signed=self.signed).permute(0, 3, 1, 2)
        with part("decoder"):
            return self.decoder(embedded)

    def optimize(self, precision: str = "auto", **options: Any) -> "AutoencoderEngine":
        """An engine that decodes and encodes as this model does now, much faster; options as in `AutoencoderEngine`."""
        from .engine.autoencoder import AutoencoderEngine

        return AutoencoderEngine(self, precision, **options)

    def forward(self, images: Tensor, *, seed: int | Tensor = 0, step: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """(reconstruction, logits) for training: the gradient passes straight through the bits."""
        logits = self.encode_logits(images)
        draw = {"seed": seed, "step": step} if self.mode == "bernoulli" else {}
        bits = bk.binarize_straight_through(logits, mode=self.mode, dim=1, **draw)  # type: ignore[arg-type]
        embedded = torch.einsum("bchw,cd->bdhw", 2 * bits - 1 if self.signed else bits, self.embedding)
        return self.decoder[-1](self.features(embedded)), logits

    def features(self, embedded: Tensor) -> Tensor:
        """What the decoder's last convolution makes the image of, from embedded bits (B, D, h, w)."""
        return self.decoder[:-1](embedded)
