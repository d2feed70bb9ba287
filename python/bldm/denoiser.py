"""BinaryDenoiser: a transformer that says of every bit how likely it is to be wrong (Wang et al. 2023, section 3.3)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.training.attention import attention, fits
from bldm_kernels.training.gelu import bias_gelu
from bldm_kernels.training.norm import add_norm

from .checkpoint import PretrainedModel
from .parts import part

if TYPE_CHECKING:
    from .engine import DenoiserEngine


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(..., width): sine and cosine of each value at width / 2 frequencies from 1 to 1 / 10,000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / max(half - 1, 1))
    angles = values.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def reference_time(t: Tensor, num_steps: int, width: int) -> Tensor:
    """Sinusoids of 4000 (t - 1) / T, in the order of operations of the paper's code.

    The order matters: at such angles the last bit of a frequency is 1e-4 of an angle.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
    angles = ((t - 1) / num_steps * 4000.0).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


TIME_EMBEDDINGS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "share": lambda t, num_steps, width: sinusoids(t * (1000.0 / num_steps), width),
    "reference": reference_time,
}


def grid_sinusoids(num_positions: int, width: int) -> Tensor:
    """(N, width): row and column of every position of a square grid, half the width each; a line if N is no square."""
    side = math.isqrt(num_positions)
    place = torch.arange(num_positions)
    if side * side != num_positions:
        return sinusoids(place, width)
    return torch.cat([sinusoids(place // side, width // 2), sinusoids(place % side, width // 2)], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, tokens, heads, dim) each -> (B, tokens, heads * dim); mask bool (B, 1, 1, keys), False: this key is not there."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """From latents to text (B, L, text_width); without text, to one learned token."""

    def __init__(self, width: int, text_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.kv, self.proj = nn.Linear(width, width), nn.Linear(text_width, 2 * width), nn.Linear(width, width)
        self.null = nn.Parameter(torch.randn(text_width) * 0.01)

    def forward(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        keys = self.null.expand(len(x), 1, -1)
        if text is not None:
            keys = torch.cat([keys, text], dim=1)
        k, v = self.kv(keys).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attend(self.query(x).unflatten(-1, (self.num_heads, -1)), k, v, mask))


# What a block adds to the residual stream: (B, T, W), and the bias (W,) that is still missing from it, if any.
Branch = tuple[Tensor, Tensor | None]


def end_branch(x: Tensor, branch: Branch | None, norm: nn.LayerNorm, fused: bool) -> tuple[Tensor, Tensor]:
    """The stream x with what the last branch adds to it, and the norm of that, which the next one begins with."""
    if branch is None:
        return x, norm(x)
    h, bias = branch
    if fused:
        return add_norm(x, h, bias, norm.weight, norm.bias, norm.eps)
    x = x + (h if bias is None else h + bias)
    return x, norm(x)


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector (LayerScale); cross attention to text between them, if any.

    It leaves what its MLP adds to the stream to the next block, whose norm comes with it in one pass.

    Attributes:
        fused: in training, take the operators of `bldm_kernels.training`; for bfloat16 on a GPU, within a CUDA graph.
    """

    fused = False

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, dropout: float, text_width: int | None = None):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))
        self.gamma1, self.gamma2 = nn.Parameter(torch.full((width,), 0.1)), nn.Parameter(torch.full((width,), 0.1))
        self.cross = None
        if text_width is not None:
            self.norm_cross, self.gamma_cross = nn.LayerNorm(width, eps=1e-5), nn.Parameter(torch.full((width,), 0.1))
            self.cross = CrossAttention(width, text_width, num_heads)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Branch]:
        """Stream and branch of the block before -> those of this one. mask: which tokens there are; text_mask: of the text."""
        fused = self.fused and self.training
        with part("norm"):
            x, h = end_branch(x, branch, self.norm1, fused)
        if fused and mask is None and fits(x.shape[1], x.shape[2], self.num_heads):
            with part("attention"):
                h = attention(h, self.qkv.weight, self.qkv.bias, self.num_heads)
        else:
            with part("qkv"):
                q, k, v = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            with part("attention"):
                h = attend(q, k, v, mask)
        with part("proj"):
            branch = self._scaled(self.proj, self.gamma1, h, fused)
        if self.cross is not None:
            with part("cross attention"):
                x, h = end_branch(x, branch, self.norm_cross, fused)
                h = self.cross(h, text, text_mask)
                branch = self.gamma_cross * F.dropout(h, self.dropout, self.training), None
        with part("norm"):
            x, h = end_branch(x, branch, self.norm2, fused)
        with part("mlp"):
            up, gelu = self.mlp[0], self.mlp[1]
            h = bias_gelu(F.linear(h, up.weight), up.bias) if fused else gelu(up(h))  # type: ignore[arg-type]
            return x, self._scaled(self.mlp[2], self.gamma2, h, fused)

    def _scaled(self, linear: Any, gamma: Tensor, x: Tensor, fused: bool) -> Branch:
        """gamma * linear(x). In training the factor goes into the weights: the output need not be kept for its gradient."""
        if not self.training:
            return gamma * linear(x), None
        weight, bias = gamma.unsqueeze(1) * linear.weight, gamma * linear.bias
        if fused and not self.dropout:
            return F.linear(x, weight), bias
        return F.dropout(F.linear(x, weight, bias), self.dropout), None


class Conditioned:
    """What a denoiser and an engine made from it know about conditions."""

    num_classes: int | None
    null_class: bool
    text_width: int | None
    cross_attention: bool
    classes: nn.Embedding | None
    text: nn.Linear | None

    def _condition_token(self, label: Tensor | None, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The token (B, width), or None for no token; and which samples have it, bool (B,), or None for all."""
        if self.classes is not None and self.null_class:
            return self.classes(torch.full_like(t, self.classes.num_embeddings - 1) if label is None else label), None
        if label is None:
            return None, None
        if self.classes is not None:
            there = label.ne(self.classes.num_embeddings)
            return self.classes(label.where(there, 0)), there
        assert self.text is not None
        return self.text(label.to(self.text.weight.dtype)), label.ne(0).any(-1)

    def _words(self, label: Tensor) -> Tensor:
        """What is attended to of the learned token and a text's L words, bool (B, 1 + L): the token where there are no words."""
        words = label.ne(0).any(-1)
        return torch.cat([~words.any(-1, keepdim=True), words], dim=1)

    def _check_label(self, label: Tensor, batch: int) -> None:
        if self.classes is not None:
            bk.checks.tensor("label", label, (torch.int64,))
            bk.checks.shape("label", label, (batch,), "one a sample")
        elif self.text_width is None:
            raise ValueError("label: this model has no classes, expected None")
        else:
            bk.checks.floating("label", label)
            length = label.shape[1:2] if self.cross_attention else ()
            bk.checks.shape("label", label, (batch, *length, self.text_width), "text features, one a sample")


class BinaryDenoiser(nn.Module, PretrainedModel, Conditioned):
    """Transformer over the positions of a binary latent; the time and condition tokens stand after them.

    Args:
        num_positions: N, positions of a latent; their learned embedding starts as sinusoids of a square grid.
        num_bits: C, bits at each position.
        width, depth, num_heads, mlp_ratio, dropout: of the transformer.
        num_classes: number of classes, or None for a model without them.
        num_steps: T it is trained with; time is told as a share of it, so skipping steps tells true times.
        time_embedding: "share": sinusoids of 1000 t / T; "reference": of 4000 (t - 1) / T, as the paper's code has it.
        null_class: no class is a class of its own; else no class is no token, as in the paper's code.
        text_width: channels of a text condition: a vector a sample, which becomes a token (no text is no token).
        cross_attention: the text is a sequence instead, which every block attends to (no text is a learned token).

    Attributes:
        null_label: the condition that means none: `num_classes`, or 0 (all zeros) for text.
        fused: as of its blocks.
    """

    fused = False

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
        time_embedding: str = "share",
        null_class: bool = True,
        text_width: int | None = None,
        cross_attention: bool = False,
    ):
        super().__init__()
        for name, value in (("num_positions", num_positions), ("num_bits", num_bits), ("num_steps", num_steps), ("depth", depth)):
            bk.checks.integer(name, value, 1, 10**6)
        if num_classes is not None:
            bk.checks.integer("num_classes", num_classes, 1, 10**6)
        if text_width is not None:
            bk.checks.integer("text_width", text_width, 1, 10**6)
        if num_classes is not None and text_width is not None:
            raise ValueError(f"num_classes, text_width: expected one of them at most, got {num_classes} and {text_width}")
        if cross_attention and text_width is None:
            raise ValueError("cross_attention: needs a text_width, got None")
        bk.checks.option("time_embedding", time_embedding, TIME_EMBEDDINGS)
        if not 0 <= bk.checks.real("dropout", dropout) < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        if width < 4 or num_heads < 1 or width % num_heads or width % 4:
            raise ValueError(f"width: expected a multiple of 4 and of num_heads = {num_heads}, got {width}")
        self.num_positions, self.num_bits, self.num_classes, self.num_steps = num_positions, num_bits, num_classes, num_steps
        self.time_embedding, self.text_width, self.cross_attention = time_embedding, text_width, cross_attention
        self.null_class = null_class
        self.null_label = 0 if text_width is not None else num_classes
        self.token_weight = nn.Parameter(torch.randn(num_bits, width) * num_bits**-0.5)
        self.token_bias = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(grid_sinusoids(num_positions, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + null_class, width) if num_classes is not None else None
        self.text = nn.Linear(text_width, width) if text_width is not None and not cross_attention else None
        seen = text_width if cross_attention else None
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, dropout, seen) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_bits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits of a set bit in x_0 XOR x_t (flip prediction) or in x_0.

        Args:
            x_t: packed uint8 (B, ..., P), N positions in all.
            t: int64 (B,), timesteps in 1..T.
            label: the condition, or None for none of it. Classes: int64 (B,), `null_label` where there is none. Text: floating
                (B, text_width), or (B, L, text_width) with cross attention; vectors of zeros are not there (padding, or
                no text), so conditional and unconditional samples, and texts of several lengths, fit one batch.

        Returns: (B, ..., C), float32 or what autocast makes of it.
        """
        bk.checks.packed("x_t", x_t, min_dim=3)
        if x_t.shape[1:-1].numel() != self.num_positions:
            raise ValueError(f"x_t: expected {self.num_positions} positions a sample, got shape {tuple(x_t.shape)}")
        bk.checks.tensor("t", t, (torch.int64,))
        bk.checks.shape("t", t, x_t.shape[:1], "one a sample")
        with part("embed"):
            x = bk.embed_bits(x_t.flatten(1, -2), self.token_weight, self.token_bias) + self.positions
        h = self.transform(x, t, label)
        with part("head"):
            logits = self.head(h)
        return logits.view(*x_t.shape[:-1], self.num_bits)

    def transform(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Embedded positions (B, N, width) through all blocks and the last norm; the rest as in `forward`."""
        with part("time and condition"):
            h, mask, text, text_mask = self._sequence(x, t, label)
        branch = None
        for i, block in enumerate(self.blocks):
            with part(f"block {i}"):
                h, branch = block(h, branch, mask, text, text_mask)
        with part("head"):
            return end_branch(h, branch, self.norm, self.fused and self.training)[1][:, : self.num_positions]

    def optimize(
        self,
        precision: str = "bf16",
        *,
        calibration: Tensor | None = None,
        calibration_cond: Tensor | None = None,
        schedule: bk.BernoulliSchedule | None = None,
        prediction: str = "flip",
    ) -> "DenoiserEngine":
        """An engine for inference: these weights in low precision, prepared once; see docs/engine.md.

        Args:
            precision: "bf16"; "fp8": the products inside the blocks in e4m3, with static scales; "float32".
            calibration: fp8: packed latents x_0 (B, ..., P) to find the scales with, and what rounding takes from the logits
                (default: a short sampling run).
            calibration_cond: conditions of the calibration, one a latent, as in `forward`.
            schedule, prediction: what the model was trained with, for the calibration (default: linear, flips).

        Returns: a module called like this one, also by a `FastSampler`. Later changes of the weights need its `refresh`.

        Raises: TypeError, ValueError naming the argument.
        """
        from .engine import DenoiserEngine

        return DenoiserEngine(self, precision, calibration, calibration_cond, schedule, prediction)

    def _sequence(self, x: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The tokens (B, N + 1 or + 2, width): positions, time, condition; which of them are there; a text and its words."""
        time = TIME_EMBEDDINGS[self.time_embedding](t, self.num_steps, x.shape[-1])
        tokens = [x, self.time(time.to(x.dtype)).unsqueeze(1)]
        mask = text = text_mask = None
        if label is not None:
            self._check_label(label, len(x))
        if self.cross_attention and label is not None:
            text, text_mask = label.to(x.dtype), self._words(label)[:, None, None]
        else:
            token, there = self._condition_token(label, t)
            if token is not None:
                tokens.append(token.to(x.dtype).unsqueeze(1))
            if there is not None:
                rest = there.new_ones(len(x), self.num_positions + 1)
                mask = torch.cat([rest, there.unsqueeze(1)], dim=1)[:, None, None]
        return torch.cat(tokens, dim=1), mask, text, text_mask
