"""The opponents' autoencoders: the convnets of `BinaryAutoencoder` around codes of a codebook, or around Gaussian channels."""

import math
from collections.abc import Sequence

import torch
from bldm.checkpoint import PretrainedModel
from bldm.convnets import plain_decoder, plain_encoder
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 0.1  # of the similarities, for the entropy of the codes
Terms = dict[str, Tensor]


class _Convnets(nn.Module):
    """Encoder, decoder and the linear map between them, which stands where `BinaryAutoencoder` embeds its bits."""

    def __init__(
        self,
        channels: int,
        encoded: int,
        image_size: int,
        in_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        attention: bool,
    ):
        super().__init__()
        widths = [base_channels * m for m in channel_multipliers]
        self.image_size, self.in_channels = image_size, in_channels
        self.side = image_size // 2 ** (len(widths) - 1)
        self.encoder = plain_encoder(in_channels, widths, encoded, 1, attention)
        self.embedding = nn.Parameter(torch.randn(channels, widths[-1]) * channels**-0.5)
        self.decoder = plain_decoder(in_channels, widths, 1, attention)

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, h, w, channels) -> images (B, in_channels, H, W)."""
        return self.decoder((latents @ self.embedding).permute(0, 3, 1, 2))


class CodeAutoencoder(_Convnets, PretrainedModel):
    """VQ-VAE (van den Oord et al. 2017) with unit vectors of few channels as codes, which keeps a codebook in use (Yu et al.
    2022, ViT-VQGAN), and several codebooks a position: log2(codes) bits each.

    Args:
        image_size, in_channels, base_channels, channel_multipliers, attention: as in `BinaryAutoencoder`.
        codebooks: codes at each position.
        codes: of each codebook.
        code_width: channels of a code.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        base_channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        attention: bool = False,
        codebooks: int = 2,
        codes: int = 256,
        code_width: int = 8,
    ):
        channels = codebooks * code_width
        super().__init__(channels, channels, image_size, in_channels, base_channels, channel_multipliers, attention)
        self.codebook = nn.Parameter(torch.randn(codebooks, codes, code_width))
        self.latent_shape = (self.side, self.side, codebooks)

    def _similarities(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors (B, h, w, G, d) and codes (G, K, d), both float32, and their products (B, h, w, G, K)."""
        vectors = self.encoder(images).permute(0, 2, 3, 1).unflatten(-1, (len(self.codebook), -1))
        vectors, codes = F.normalize(vectors.float(), dim=-1), F.normalize(self.codebook.float(), dim=-1)
        return vectors, codes, torch.einsum("bhwgd,gkd->bhwgk", vectors, codes)

    def _look_up(self, codes: Tensor, tokens: Tensor) -> Tensor:
        return codes[torch.arange(len(codes), device=tokens.device), tokens]

    def _embed(self, vectors: Tensor) -> Tensor:
        return vectors.flatten(-2).to(self.embedding.dtype) * math.sqrt(vectors.shape[-1])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> tokens int16 (B, h, w, G)."""
        return self._similarities(images)[2].argmax(-1).short()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, G) -> images, about in [-1, 1]."""
        return self._decode(self._embed(self._look_up(F.normalize(self.codebook, dim=-1), tokens.long())))

    def forward(self, images: Tensor) -> tuple[Tensor, Terms]:
        """(reconstruction, what is added to its loss): the gradient passes straight through the choice of the code."""
        vectors, codes, similar = self._similarities(images)
        chosen = self._look_up(codes, similar.argmax(-1))
        use = (similar / TEMPERATURE).softmax(-1).mean((0, 1, 2))
        terms = {
            "codebook": (chosen - vectors.detach()).square().sum(-1).mean(),
            "commitment": 0.25 * (vectors - chosen.detach()).square().sum(-1).mean(),
            "entropy": 0.01 * (use * use.clamp(min=1e-9).log()).sum(-1).mean() / math.log(len(use[0])),
        }
        return self._decode(self._embed(vectors + (chosen - vectors).detach())), terms


class GaussianAutoencoder(_Convnets, PretrainedModel):
    """The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022): a mean and a variance of every channel.

    Args:
        image_size, in_channels, base_channels, channel_multipliers, attention: as in `BinaryAutoencoder`.
        channels: at each position.
        kl_weight: of KL(q || N(0, 1)), summed over a latent and divided by its image's pixels.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        base_channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        attention: bool = False,
        channels: int = 4,
        kl_weight: float = 1e-4,
    ):
        super().__init__(channels, 2 * channels, image_size, in_channels, base_channels, channel_multipliers, attention)
        self.latent_shape, self.kl_weight = (self.side, self.side, channels), kl_weight

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images).permute(0, 2, 3, 1).float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-20, 10)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> the means float32 (B, h, w, C)."""
        return self._moments(images)[0].contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, h, w, C) -> images, about in [-1, 1]."""
        return self._decode(latents)

    def forward(self, images: Tensor) -> tuple[Tensor, Terms]:
        """(reconstruction of a draw, what is added to its loss)."""
        mean, log_variance = self._moments(images)
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / images.numel()
        return self._decode(drawn.to(images.dtype)), {"kl": self.kl_weight * kl}
