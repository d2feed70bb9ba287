"""The opponents: masked prediction of a codebook's tokens, and a Gaussian diffusion, by the transformer of `BinaryDenoiser`.

Like `BinaryLatentDiffusion` each has `autoencoder`, `denoiser`, `encode`, `decode` and `sample`; `loss` is what it minimises.
"""

import math
from typing import Any

import torch
from autoencoders import CodeAutoencoder, GaussianAutoencoder
from bldm.checkpoint import PretrainedModel
from bldm.denoiser import BinaryDenoiser
from torch import Tensor, nn
from torch.nn import functional as F

NUM_STEPS = 1024  # times that the transformer is told: shares of masked tokens, or of the way to noise
CHOICE_TEMPERATURE = 4.5  # of the noise on a token's confidence, falling to 0 (Chang et al. 2022)


class VectorDenoiser(BinaryDenoiser):
    """`BinaryDenoiser` of real channels: the same weights, an input of floats."""

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x_t (B, h, w, C), t int64 (B,) in 1..num_steps -> (B, h, w, C)."""
        x = x_t.to(self.token_weight.dtype).flatten(1, 2) @ self.token_weight + self.token_bias + self.positions
        return self.head(self.transform(x, t, label)).view(x_t.shape)


class TokenDenoiser(VectorDenoiser):
    """`BinaryDenoiser` of tokens; the weights that embed a token predict it too, as in MaskGIT.

    Args:
        num_bits: codebooks * codes: rows of the table of tokens.
        codebooks: tokens a position.
        others: as in `BinaryDenoiser`.
    """

    def __init__(self, num_positions: int, num_bits: int, codebooks: int, **others: Any):
        super().__init__(num_positions, num_bits, **others)
        self.codebooks, self.codes = codebooks, num_bits // codebooks
        del self.head
        self.head_bias = nn.Parameter(torch.zeros(num_bits))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Tokens (B, h, w, G), -1 where masked, t as above -> logits (B, h, w, G, codes)."""
        tokens = x_t.flatten(1, 2).long()
        offsets = torch.arange(self.codebooks, device=tokens.device) * self.codes
        # a masked token adds nothing; the factor is that of tied embeddings (Vaswani et al. 2017)
        rows = F.embedding(tokens.clamp(min=0) + offsets, self.token_weight) * tokens.ge(0).unsqueeze(-1)
        x = rows.sum(2) * math.sqrt(rows.shape[-1]) + self.token_bias + self.positions
        h = self.transform(x, t, label)
        return F.linear(h, self.token_weight.to(h.dtype), self.head_bias.to(h.dtype)).view(*x_t.shape, self.codes)


def guided(denoiser: BinaryDenoiser, x: Tensor, t: int, label: Tensor | None, scale: float) -> Tensor:
    """free + scale (conditional - free), float32; free of the condition is the null label."""
    time = torch.full((len(x),), t, device=x.device)
    if label is None or scale == 1:
        return denoiser(x, time, label).float()
    both = torch.cat([label, torch.full_like(label, denoiser.null_label)])  # type: ignore[arg-type]
    conditional, free = denoiser(torch.cat([x, x]), torch.cat([time, time]), both).float().chunk(2)
    return free + scale * (conditional - free)


class _Opponent(nn.Module):
    autoencoder: Any
    denoiser: Any

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.autoencoder.latent_shape

    def encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        steps: int,
        *,
        labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        batch_size: int = 1000,
    ) -> Tensor:
        """Images (B, channels, H, W), about in [-1, 1]; labels: classes or features of texts, one a sample."""
        device = self.denoiser.positions.device
        generator = torch.Generator(device).manual_seed(seed)
        images = []
        for rows in torch.arange(num_samples).split(batch_size):
            label = None if labels is None else labels[rows.to(labels.device)]
            images.append(self.decode(self._draw(len(rows), steps, label, guidance_scale, generator)))
        return torch.cat(images)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def _draw(self, count: int, steps: int, label: Tensor | None, scale: float, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class MaskedTokens(_Opponent, PretrainedModel):
    """MaskGIT (Chang et al. 2022) on the tokens of a `CodeAutoencoder`, every token of a position being masked on its own.

    Args: of the two parts.
    """

    def __init__(self, autoencoder: dict[str, Any], denoiser: dict[str, Any]):
        super().__init__()
        self.autoencoder = CodeAutoencoder(**autoencoder)
        height, width, codebooks = self.latent_shape
        rows = self.autoencoder.codebook.shape[:2].numel()
        self.denoiser = TokenDenoiser(height * width, rows, codebooks, num_steps=NUM_STEPS, **denoiser)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.autoencoder.decode(tokens)

    def loss(self, denoiser: Any, tokens: Tensor, label: Tensor | None) -> Tensor:
        """Cross entropy of the masked tokens, whose share is cos(pi u / 2), u uniform in 0..1."""
        share = torch.cos(torch.rand(len(tokens), device=tokens.device) * math.pi / 2)
        order = torch.rand(len(tokens), tokens[0].numel(), device=tokens.device)
        masked = order < share[:, None]
        masked[torch.arange(len(tokens)), order.argmin(1)] = True  # one at least
        masked = masked.view(tokens.shape)
        time = (share * NUM_STEPS).ceil().long().clamp(1, NUM_STEPS)
        logits = denoiser(tokens.long().masked_fill(masked, -1), time, label)
        losses = F.cross_entropy(logits.float().flatten(0, -2), tokens.long().flatten(), reduction="none")
        return (losses * masked.flatten()).sum() / masked.sum()

    def _draw(self, count: int, steps: int, label: Tensor | None, scale: float, generator: torch.Generator) -> Tensor:
        shape = (count, *self.latent_shape)
        total = math.prod(self.latent_shape)
        tokens = torch.full(shape, -1, device=generator.device)
        for step in range(steps):
            share = math.cos(step / steps * math.pi / 2)
            logits = guided(self.denoiser, tokens, max(math.ceil(share * NUM_STEPS), 1), label, scale)
            noise = torch.empty_like(logits).exponential_(generator=generator).log()
            drawn = (logits - noise).argmax(-1)  # Gumbel: a draw from the softmax
            confidence = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            noise = torch.empty_like(confidence).exponential_(generator=generator).log()
            confidence = confidence - CHOICE_TEMPERATURE * (1 - (step + 1) / steps) * noise
            masked = tokens < 0
            tokens = torch.where(masked, drawn, tokens)
            left = math.floor(math.cos((step + 1) / steps * math.pi / 2) * total) if step + 1 < steps else 0
            # the least confident of the new ones are masked again; old ones stay: the masked never become more
            doubtful = confidence.masked_fill(~masked, math.inf).flatten(1).argsort(1)[:, :left]
            tokens = tokens.flatten(1).scatter(1, doubtful, -1).view(shape)
        return tokens


class GaussianDiffusion(_Opponent, PretrainedModel):
    """Latent diffusion with the cosine schedule, v prediction (Salimans & Ho 2022) and DDIM (Song et al. 2021) on the means of a
    `GaussianAutoencoder`, each channel brought to mean 0 and variance 1.

    Args: of the two parts.
    """

    def __init__(self, autoencoder: dict[str, Any], denoiser: dict[str, Any]):
        super().__init__()
        self.autoencoder = GaussianAutoencoder(**autoencoder)
        height, width, channels = self.latent_shape
        self.denoiser = VectorDenoiser(height * width, channels, num_steps=NUM_STEPS, **denoiser)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def standardise(self, latents: Tensor) -> None:
        """Take the channels' mean and deviation from the training set's latents (N, h, w, C)."""
        flat = latents.flatten(0, 2)
        self.mean, self.deviation = flat.mean(0).to(self.mean), flat.std(0).to(self.mean)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def loss(self, denoiser: Any, latents: Tensor, label: Tensor | None) -> Tensor:
        """Squared error of v = alpha noise - sigma x_0, at times uniform in 1..T."""
        x_0 = (latents - self.mean) / self.deviation
        t = torch.randint(1, NUM_STEPS + 1, (len(x_0),), device=x_0.device)
        angle = (t * (math.pi / 2 / NUM_STEPS)).view(-1, 1, 1, 1)
        noise = torch.randn_like(x_0)
        v = denoiser(angle.cos() * x_0 + angle.sin() * noise, t, label)
        return F.mse_loss(v.float(), angle.cos() * noise - angle.sin() * x_0)

    def _draw(self, count: int, steps: int, label: Tensor | None, scale: float, generator: torch.Generator) -> Tensor:
        x = torch.randn(count, *self.latent_shape, generator=generator, device=generator.device)
        times = torch.linspace(NUM_STEPS, 0, steps + 1).round().long().tolist()
        for now, later in zip(times, times[1:], strict=False):
            v = guided(self.denoiser, x, now, label, scale)
            angle, to = (t * math.pi / 2 / NUM_STEPS for t in (now, later))
            x_0, noise = math.cos(angle) * x - math.sin(angle) * v, math.sin(angle) * x + math.cos(angle) * v
            x = math.cos(to) * x_0 + math.sin(to) * noise
        return x * self.deviation + self.mean
