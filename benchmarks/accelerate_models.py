"""Models of the size and shape of two published code bases, random weights, with samplers that do what theirs do, as they do it.

Written for the comparison in accelerate.py: the same operations in the same order (float32 states, two hypotheses side by
side, one likelihood factor a skipped timestep), none of the code.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoids(time: Tensor, width: int, device: torch.device | str) -> Tensor:
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / (half - 1)))
    angles = time[:, None].float() * frequencies.to(time.device)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# --- the paper's denoiser (churches, C64) ------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1, self.ln2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.ln1(x))
        return x + self.gamma_2 * self.mlp(self.ln2(x))


class PaperDenoiser(nn.Module):
    """256 tokens of 64 bits and a time token; (x, label=None, time_steps=...)."""

    def __init__(self, tokens: int = 256, bits: int = 64, width: int = 768, depth: int = 24, heads: int = 12, steps: int = 64):
        super().__init__()
        self.tokens, self.width, self.steps = tokens, width, steps
        self.tok_emb = nn.Embedding(bits, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.l0, self.linear = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, bits)

    def forward(self, x: Tensor, label: Tensor | None = None, time_steps: Tensor | None = None) -> Tensor:
        assert time_steps is not None
        h = (x * 1.0 - 0.5) * 2.0 @ self.tok_emb.weight + self.pos_emb
        time = self.linear(F.silu(self.l0(sinusoids(time_steps / self.steps * 4000, self.width, x.device))))
        h = self.blocks(torch.cat([h, time.unsqueeze(1)], 1))
        return self.head(self.ln_f(h[:, : self.tokens]))


# --- BiGR's head -------------------------------------------------------------------------------------------------------
class HeadBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class HeadDenoiser(nn.Module):
    """One token a row; (x, time_steps, c). The frequencies of the time are made on the CPU at every call."""

    def __init__(self, bits: int = 24, width: int = 1024, blocks: int = 3, features: int = 1024):
        super().__init__()
        self.in_dim, self.width = bits, width
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.x_embedder, self.c_embedder = nn.Linear(bits, width), nn.Linear(features, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, bits)

    def forward(self, x: Tensor, time_steps: Tensor, c: Tensor) -> Tensor:
        h = self.x_embedder((x * 1.0 - 0.5) * 2.0)
        c = self.time(sinusoids(time_steps, 256, "cpu")) + self.c_embedder(c)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return self.linear(self.norm(h) * (1 + scale) + shift)


# --- the samplers ------------------------------------------------------------------------------------------------------
class Scheduler(nn.Module):
    """The linear schedule as tables of float32."""

    def __init__(self, steps: int):
        super().__init__()
        beta = np.array([1.0] + [1 - 1 / (steps - t + 1) for t in range(1, steps + 1)])
        for name, table in (("beta", beta), ("k_final", np.cumprod(beta)), ("b_final", (1 - np.cumprod(beta)) / 2)):
            self.register_buffer(name, torch.from_numpy(table).float())

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return getattr(self, name)[t].view(-1, *[1] * (x.ndim - 1))

    def one_step(self, x: Tensor, t: Tensor) -> Tensor:
        k = self._at("beta", t, x)
        return x * k + 0.5 * (1 - k)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self._at("k_final", t, x) * x + self._at("b_final", t, x)


class Sampler(nn.Module):
    """The reverse loop that both share."""

    def __init__(self, denoiser: nn.Module, steps: int):
        super().__init__()
        self._denoise_fn, self.num_timesteps, self.p_flip = denoiser, steps, True
        self.scheduler = Scheduler(steps)

    @torch.no_grad()
    def reverse(self, x: Tensor, sample_steps: int, logits_at: Any) -> tuple[Tensor, Tensor]:
        """(bits, probabilities of the last step)."""
        spaced = (np.linspace(0.0, 1.0, sample_steps) * (self.num_timesteps - 1)).astype(int) + 1
        timesteps = spaced[::-1]
        for i, now in enumerate(timesteps):
            t = torch.full((len(x),), int(now), device=x.device, dtype=torch.long)
            p = torch.sigmoid(logits_at(x, t - 1))
            p = x * (1 - p) + (1 - x) * p
            if t[0].item() == 1:
                x = (p > 0.5) * 1.0
                continue
            prior = self.scheduler(torch.stack([p, 1 - p], -1), torch.full_like(t, int(timesteps[i + 1])))
            likelihood = torch.stack([x, 1 - x], -1)
            for skipped in range(timesteps[i] - timesteps[i + 1]):
                likelihood = self.scheduler.one_step(likelihood, t - skipped)
            posterior = prior * likelihood
            x = torch.bernoulli((posterior / posterior.sum(-1, keepdim=True))[..., 0])
        return x, p


class PaperSampler(Sampler):
    def __init__(self, denoiser: nn.Module, steps: int = 64):
        super().__init__(denoiser, steps)
        self.shape, self.codebook_size, self.dataset = (1, 16, 16), 64, "churches"

    def sample(
        self,
        temp: float = 1.0,
        sample_steps: int = 16,
        b: int = 5,
        return_all: bool = False,
        label: Any = None,
        mask: Any = None,
        guidance: Any = None,
        full: bool = False,
    ) -> Tensor:
        x = torch.bernoulli(0.5 * torch.ones((b, math.prod(self.shape), self.codebook_size), device=self.scheduler.beta.device))
        return self.reverse(x, sample_steps, lambda x, t: self._denoise_fn(x, time_steps=t) / temp)[0]


class HeadSampler(Sampler):
    def __init__(self, denoiser: nn.Module, steps: int = 256):
        super().__init__(denoiser, steps)

    def sample(
        self,
        temp: float = 1.0,
        sample_steps: int = 100,
        return_all: bool = False,
        cond: Any = None,
        mask: Any = None,
        cfg_scale: Any = None,
        full: bool = False,
        return_logits: bool = False,
    ) -> Tensor:
        with_cond, without = cond.chunk(2)

        def logits_at(x: Tensor, t: Tensor) -> Tensor:
            l_c = self._denoise_fn(x, time_steps=t, c=with_cond) / temp
            l_u = self._denoise_fn(x, time_steps=t, c=without) / temp
            return l_u + cfg_scale * (l_c - l_u)

        x = torch.bernoulli(0.5 * torch.ones((len(with_cond), self._denoise_fn.in_dim), device=cond.device))
        bits, p = self.reverse(x, sample_steps, logits_at)
        return p if return_logits else bits


# --- for `bldm profile --import accelerate_models:paper` -----------------------------------------------------------------
def paper(batch: int, steps: int, device: torch.device) -> tuple[nn.Module, Any]:
    """The paper's sampler for `bldm.accelerate`, and how to draw a batch from it."""
    with device:
        model = PaperSampler(PaperDenoiser()).to(device).eval()
    return model, lambda fast: fast.sample(sample_steps=steps, b=batch)
