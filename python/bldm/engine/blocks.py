"""A block of the transformer in an engine: `Block`, with its norms and LayerScales folded into the products."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from bldm_kernels.inference.attention import cross_attention, supports
from bldm_kernels.inference.product import product

from ..denoiser import Block
from ..parts import part
from .products import Product
from .report import Part
from .stream import ResidualStream

Scales = dict[str, Tensor]  # of the inputs that a block's products read as e4m3, by the product's name


def of_norm(name: str, scales: Scales) -> dict[str, Tensor | None]:
    """The scales of a product behind a norm: of the norm, and of the stream before it."""
    return {"input_scale": scales.get(name), "stream_scale": scales.get(f"{name} stream")}


class EngineBlock(nn.Module):
    """A block on the residual stream of B samples of T tokens."""

    def __init__(self, block: Block, dtype: torch.dtype, scales: Scales):
        super().__init__()
        self.num_heads = block.num_heads
        expand, contract = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
        self.qkv = Product(block.qkv, dtype, norm=block.norm1, **of_norm("qkv", scales))
        self.proj = Product(block.proj, dtype, gamma=block.gamma1, input_scale=scales.get("proj"))
        self.cross = None if block.cross is None else EngineCross(block, dtype, scales)
        self.expand = Product(expand, dtype, norm=block.norm2, **of_norm("expand", scales))
        self.contract = Product(contract, dtype, gamma=block.gamma2, input_scale=scales.get("contract"))

    def forward(self, stream: ResidualStream, batch: int, mask: Tensor | None, kv: Tensor | None, kv_mask: Tensor | None) -> None:
        """Change the stream (B T, W).

        Args:
            mask: bool (B, T), the tokens that are there; None: all.
            kv, kv_mask: keys and values (B, L, 2 W) of the cross attention, and bool (B, L), those that are there.
        """
        mixed = stream.attend(self.qkv, self.num_heads, batch, mask, self.proj)
        with part("proj"):
            stream.add(self.proj, mixed)
        if self.cross is not None:
            assert kv is not None
            with part("cross attention"):
                self.cross(stream, kv, kv_mask)
        with part("mlp up"):
            inner = stream.read(self.expand, gelu=True, reader=self.contract)
        with part("mlp down"):
            stream.add(self.contract, inner)

    def stages(self) -> list[tuple[Product, Product]]:
        """The products that read the stream, each with the one that then adds to it, in the order of `forward`."""
        cross = [] if self.cross is None else [(self.cross.query, self.cross.mix)]
        return [(self.qkv, self.proj), *cross, (self.expand, self.contract)]

    def report(self, tokens: int) -> list[Part]:
        """What runs the parts, with this many tokens a sample."""
        made = torch.empty(1, tokens, len(self.qkv.weight), dtype=self.qkv.bias.dtype, device=self.qkv.weight.device)
        parts = [*self.qkv.report("qkv", tokens), Part.of("attention", made.shape[1:], supports(made, self.num_heads))]
        named = {"proj": self.proj, "mlp up": self.expand, "mlp down": self.contract}
        if self.cross is not None:
            named |= {"cross attention's query": self.cross.query, "cross attention's proj": self.cross.mix}
            parts.append(Part("cross attention", (tokens, len(self.cross.query.weight)), "scaled_dot_product_attention"))
        return [*parts, *(part for name, product in named.items() for part in product.report(name, tokens))]


def set_offsets(blocks: Sequence[EngineBlock]) -> Tensor:
    """Let the residual stream have the biases of all that is added to it from the start: their sum (W,), for the embedding.

    A product that adds in place has no room for a bias. So every norm takes off again what has not come yet: its offset.
    """
    stages = [stage for block in blocks for stage in block.stages()]
    ahead = torch.zeros_like(stages[0][0].offset)
    for reads, adds in reversed(stages):
        ahead = ahead + adds.bias.float()
        reads.offset.copy_(-ahead)
    return ahead


class EngineCross(nn.Module):
    """The cross attention of a block; its keys and values are made once a run."""

    null: Tensor

    def __init__(self, block: Block, dtype: torch.dtype, scales: Scales):
        super().__init__()
        assert block.cross is not None
        self.num_heads = block.num_heads
        self.query = Product(block.cross.query, dtype, norm=block.norm_cross, **of_norm("query", scales))
        self.kv = Product(block.cross.kv, dtype)
        self.mix = Product(block.cross.proj, dtype, gamma=block.gamma_cross, input_scale=scales.get("mix"))
        self.register_buffer("null", block.cross.null.detach().to(dtype, copy=True))

    def keys_and_values(self, text: Tensor | None, batch: int) -> Tensor:
        """(B, L, 2 W): of the learned token, and of the words (B, L - 1, text_width)."""
        keys = self.null.expand(batch, 1, -1)
        if text is not None:
            keys = torch.cat([keys, text.to(keys.dtype)], dim=1)
        return product(keys.flatten(0, 1).contiguous(), self.kv.weights).unflatten(0, keys.shape[:2])

    def forward(self, stream: ResidualStream, kv: Tensor, kv_mask: Tensor | None) -> None:
        q = stream.read(self.query).unflatten(0, (len(kv), -1))
        mixed = cross_attention(q, kv, self.num_heads, kv_mask, self.mix.input_scale)
        stream.add(self.mix, mixed.flatten(0, 1))
