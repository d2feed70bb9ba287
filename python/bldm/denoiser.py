"""BinaryDenoiser: a transformer that says of every bit how likely it is to be wrong (Wang et al. 2023, section 3.3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

from .checkpoint import PretrainedModel


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(..., width): sine and cosine of each value at width / 2 frequencies from 1 to 1 / 10,000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / max(half - 1, 1))
    angles = values.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_sinusoids(num_positions: int, width: int) -> Tensor:
    """(N, width): row and column of every position of a square grid, half the width each; a line if N is no square."""
    side = math.isqrt(num_positions)
    place = torch.arange(num_positions)
    if side * side != num_positions:
        return sinusoids(place, width)
    return torch.cat([sinusoids(place // side, width // 2), sinusoids(place % side, width // 2)], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector (LayerScale)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))
        self.gamma1, self.gamma2 = nn.Parameter(torch.full((width,), 0.1)), nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.gamma1 * F.dropout(self.proj(h), self.dropout, self.training)
        return x + self.gamma2 * F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class BinaryDenoiser(nn.Module, PretrainedModel):
    """Transformer over the positions of a binary latent; the time and class tokens stand after them.

    Args:
        num_positions: N, positions of a latent; their learned embedding starts as sinusoids of a square grid.
        num_bits: C, bits at each position.
        width, depth, num_heads, mlp_ratio, dropout: of the transformer.
        num_classes: number of classes, or None for an unconditional model.
        num_steps: T of the schedule it is trained with; time is told as t / T, so skipping steps tells true times.
    """

    def __init__(
        self,
        num_positions: int,
        num_bits: int,
        width: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        num_classes: int | None = None,
        num_steps: int = 256,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value in (("num_positions", num_positions), ("num_bits", num_bits), ("num_steps", num_steps), ("depth", depth)):
            bk.checks.integer(name, value, 1, 10**6)
        if num_classes is not None:
            bk.checks.integer("num_classes", num_classes, 1, 10**6)
        if not 0 <= bk.checks.real("dropout", dropout) < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        if width < 4 or num_heads < 1 or width % num_heads or width % 4:
            raise ValueError(f"width: expected a multiple of 4 and of num_heads = {num_heads}, got {width}")
        self.num_positions, self.num_bits, self.num_classes, self.num_steps = num_positions, num_bits, num_classes, num_steps
        self.null_label = num_classes
        self.token_weight = nn.Parameter(torch.randn(num_bits, width) * num_bits**-0.5)
        self.token_bias = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(grid_sinusoids(num_positions, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_bits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits of a set bit in x_0 XOR x_t (flip prediction) or in x_0.

        Args:
            x_t: packed uint8 (B, ..., P), N positions in all.
            t: int64 (B,), timesteps in 1..T.
            label: int64 (B,), classes or `null_label`; None: no class. An unconditional model takes None only.

        Returns: (B, ..., C), float32 or what autocast makes of it.
        """
        bk.checks.packed("x_t", x_t, min_dim=3)
        if x_t.shape[1:-1].numel() != self.num_positions:
            raise ValueError(f"x_t: expected {self.num_positions} positions a sample, got shape {tuple(x_t.shape)}")
        for name, value in (("t", t), ("label", label)):
            if value is not None:
                bk.checks.tensor(name, value, (torch.int64,))
                bk.checks.shape(name, value, x_t.shape[:1], "one a sample")
        x = bk.embed_bits(x_t.flatten(1, -2), self.token_weight, self.token_bias) + self.positions
        time = self.time(sinusoids(t * (1000.0 / self.num_steps), x.shape[-1]).to(x.dtype))
        tokens = [x, time.unsqueeze(1)]
        if self.classes is not None:
            if label is None:
                label = torch.full_like(t, self.classes.num_embeddings - 1)
            tokens.append(self.classes(label).unsqueeze(1))
        elif label is not None:
            raise ValueError("label: this model has no classes, expected None")
        h = torch.cat(tokens, dim=1)
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h[:, : x.shape[1]]))
        return logits.view(*x_t.shape[:-1], self.num_bits)
