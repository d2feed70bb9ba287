"""Stand-ins for the models of the paper's own code: the same structure, tensor names and arithmetic, written independently."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(before), group_norm(after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.conv_out = nn.Conv2d(before, after, 1)  # there in any case
        self.changes = before != after

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_out(x) if self.changes else x)


class PixelAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, width: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, -1).repeat_interleave(2, -2))


class Chain(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PaperAutoencoder(nn.Module):
    """What a `binaryae_*.th` holds is `PaperAutoencoder(...).checkpoint()`."""

    def __init__(
        self,
        num_bits: int = 12,
        channels: int = 3,
        nf: int = 32,
        ch_mult: Sequence[int] = (1, 2),
        res_blocks: int = 1,
        gen_mul: float = 1.0,
        attention: Sequence[int] = (1,),
        emb_dim: int = 32,
        norm_first: bool = True,
        tanh: bool = False,
    ):
        super().__init__()
        self.num_bits, self.norm_first, self.tanh = num_bits, norm_first, tanh
        widths = [nf * m for m in ch_mult]
        top = widths[-1]
        down: list[nn.Module] = [nn.Conv2d(channels, nf, 3, padding=1)]
        width = nf
        for level, wanted in enumerate(widths):
            for _ in range(res_blocks):
                down += [Residual(width, wanted), *([PixelAttention(wanted)] if level in attention else [])]
                width = wanted
            if wanted is not widths[-1] or level < len(widths) - 1:
                down.append(Resample(width, down=True))
        down += [
            Residual(top, top),
            PixelAttention(top),
            Residual(top, top),
            group_norm(top),
            nn.Conv2d(top, emb_dim, 3, padding=1),
        ]
        up: list[nn.Module] = [group_norm(emb_dim)] if norm_first else []
        up += [nn.Conv2d(emb_dim, top, 3, padding=1), Residual(top, top), PixelAttention(top), Residual(top, top)]
        for level in reversed(range(len(widths))):
            for _ in range(int(res_blocks * gen_mul)):
                up += [Residual(width, widths[level]), *([PixelAttention(widths[level])] if level in attention else [])]
                width = widths[level]
            if level:
                up.append(Resample(width, down=False))
        up += [group_norm(width), nn.Conv2d(width, channels, 3, padding=1)]
        self.encoder, self.generator = Chain(down), Chain(up)
        self.generator.logsigma = nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, channels, 1))
        self.quantize = nn.Module()
        self.quantize.proj = nn.Sequential(nn.Conv2d(emb_dim, num_bits, 1))
        self.quantize.embed = nn.Embedding(num_bits, emb_dim)

    def probability(self, images: Tensor) -> Tensor:
        """(B, C, h, w) of each bit being 1."""
        logits = self.quantize.proj(self.encoder(images))
        return 0.5 * logits.tanh() + 0.5 if self.tanh else logits.sigmoid()

    def decode(self, bits: Tensor, divide: bool = False) -> Tensor:
        """Bits 0 and 1 (B, C, h, w) -> images."""
        code = 2 * bits - 1 if self.tanh else bits
        code = code / self.num_bits if divide else code
        return self.generator(torch.einsum("bchw,cd->bdhw", code, self.quantize.embed.weight))

    def checkpoint(self) -> dict[str, Tensor]:
        companions = {"disc.main.0.weight": torch.randn(4, 3), "disc.main.3.num_batches_tracked": torch.tensor(7)}
        companions |= {"perceptual.net.slice1.0.weight": torch.randn(2, 2)}
        return {f"ae.{name}": value for name, value in self.state_dict().items()} | companions


def heads_apart(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    return x.view(batch, tokens, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def soft_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return h.transpose(1, 2).flatten(2)


class PaperBlock(nn.Module):
    def __init__(self, width: int, heads: int, text_width: int | None):
        super().__init__()
        self.heads, self.cross = heads, None
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))
        if text_width is not None:
            self.ln1_5, self.gamma_1_5 = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
            self.cross = nn.Module()
            self.cross.kv, self.cross.query = nn.Linear(text_width, 2 * width), nn.Linear(width, width)
            self.cross.proj, self.cross.null_emb = nn.Linear(width, width), nn.Parameter(torch.randn(1, 1, text_width))

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        x = x + self.gamma_1 * self.attn.proj(soft_attention(*heads_apart(self.attn.qkv(self.ln1(x)), 3, self.heads)))
        if self.cross is not None:
            keys = self.cross.null_emb.repeat(len(x), 1, 1) if text is None else text
            (q,) = heads_apart(self.cross.query(self.ln1_5(x)), 1, self.heads)
            h = soft_attention(q, *heads_apart(self.cross.kv(keys), 2, self.heads))
            x = x + self.gamma_1_5 * self.cross.proj(h)
        return x + self.gamma_2 * self.mlp(self.ln2(x))


class PaperDenoiser(nn.Module):
    """Bits 0 and 1 (B, N, C), label or None, t - 1 -> logits (B, N, C)."""

    def __init__(self, condition: str, num_bits: int, side: int, width: int, depth: int, heads: int, sample_steps: int):
        super().__init__()
        self.condition, self.sample_steps = condition, sample_steps
        self.tok_emb = nn.Embedding(num_bits, width)
        self.pos_emb = nn.Parameter(torch.randn(1, side * side, width))
        if condition == "class":
            self.cls_embedding: nn.Module = nn.Embedding(5, width)
        elif condition == "text":
            self.cls_embedding = nn.Linear(20, width)
        text_width = 12 if condition == "cross" else None
        self.blocks = nn.Sequential(*[PaperBlock(width, heads, text_width) for _ in range(depth)])
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, num_bits)
        self.time_step_embedding = nn.Module()
        self.time_step_embedding.l0, self.time_step_embedding.linear = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, label: Tensor | None = None, *, time_steps: Tensor) -> Tensor:
        tokens = (2 * x - 1) @ self.tok_emb.weight + self.pos_emb
        half = tokens.shape[-1] // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = (time_steps / float(self.sample_steps) * 4000.0)[:, None] * frequencies
        time = torch.cat([angles.sin(), angles.cos()], -1)
        time = self.time_step_embedding.linear(F.silu(self.time_step_embedding.l0(time)))
        h = torch.cat([tokens, time[:, None]], 1)
        if self.condition in ("class", "text") and label is not None:
            h = torch.cat([h, self.cls_embedding(label)[:, None]], 1)
        for block in self.blocks:
            h = block(h, label if self.condition == "cross" else None)
        return self.head(self.ln_f(h[:, : x.shape[1]]))


class PaperDiffusion(nn.Module):
    """What a `bld_*.th` holds is its state dict."""

    def __init__(
        self,
        condition: str = "none",
        schedule: str = "linear",
        num_steps: int = 16,
        sample_steps: int | None = None,
        num_bits: int = 12,
        side: int = 4,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        embedding: Tensor | None = None,
    ):
        super().__init__()
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        noise = (3 * u / 0.8).sigmoid()
        keep = {
            "linear": 1 - u,
            "cosine": 0.5 + 0.5 * (math.pi * u).cos(),
            "sigmoid": (noise[-1] - noise) / (noise[-1] - noise[0]),
            "square": (1 - u) ** 2,  # not in the paper's code
        }[schedule]
        beta = torch.cat([keep[:1], keep[1:] / keep[:-1]]).float()
        self.scheduler = nn.Module()
        for name, table in {"k_final": keep, "b_final": 0.5 - keep / 2, "beta": beta, "cumbeta": beta.cumprod(0)}.items():
            self.scheduler.register_buffer(name, table.float())
        steps = num_steps if sample_steps is None else sample_steps
        self._denoise_fn = PaperDenoiser(condition, num_bits, side, width, depth, heads, steps)
        self.embedding_weight = nn.Parameter(torch.randn(num_bits, 32) if embedding is None else embedding.clone())


def randomised(model: Any) -> Any:
    """Gains and biases that matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
