"""A block of the transformer in an engine, on a residual stream that is changed in place."""

from typing import cast

import torch
from torch import Tensor, nn

from bldm_kernels.inference.attention import attention, cross_attention

from ..denoiser import Block
from ..parts import part
from .products import Product

Scales = dict[str, Tensor]  # of the activations that a block's products read as e4m3, by the product's name; empty: none


class EngineBlock(nn.Module):
    """`Block`, with its norms and LayerScales folded into the products."""

    def __init__(self, block: Block, dtype: torch.dtype, scales: Scales):
        super().__init__()
        self.num_heads = block.num_heads
        expand, contract = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
        self.qkv = Product(block.qkv, dtype, norm=block.norm1, input_scale=scales.get("qkv"))
        self.proj = Product(block.proj, dtype, gamma=block.gamma1, input_scale=scales.get("proj"))
        self.expand = Product(expand, dtype, norm=block.norm2, input_scale=scales.get("expand"))
        self.contract = Product(contract, dtype, gamma=block.gamma2, input_scale=scales.get("contract"))
        self.cross = None if block.cross is None else EngineCross(block, dtype, scales)

    def forward(self, h: Tensor, mask: Tensor | None, kv: Tensor | None, kv_mask: Tensor | None) -> None:
        """h (B, T, W), mask bool (B, T) of the tokens that are there; kv (B, L, 2 W) and kv_mask (B, L) with cross attention."""
        with part("qkv"):
            qkv = self.qkv(h)
        with part("attention"):
            mixed = attention(qkv, self.num_heads, mask, self.proj.input_scale)
        with part("proj"):
            self.proj(mixed, residual=h)
        if self.cross is not None:
            with part("cross attention"):
                self.cross(h, kv, kv_mask)
        with part("mlp"):
            self.contract(self.expand(h, gelu=True, out_scale=self.contract.input_scale), residual=h)


class EngineCross(nn.Module):
    """The cross attention of a block; its keys and values are made once a run."""

    null: Tensor

    def __init__(self, block: Block, dtype: torch.dtype, scales: Scales):
        super().__init__()
        assert block.cross is not None
        self.num_heads = block.num_heads
        self.query = Product(block.cross.query, dtype, norm=block.norm_cross, input_scale=scales.get("query"))
        self.mix = Product(block.cross.proj, dtype, gamma=block.gamma_cross, input_scale=scales.get("mix"))
        self.kv = Product(block.cross.kv, dtype)
        self.register_buffer("null", block.cross.null.detach().to(dtype, copy=True))

    def keys_and_values(self, text: Tensor | None, rows: int) -> Tensor:
        """(rows, L, 2 W): of the learned token, and of the words (rows, L - 1, text_width)."""
        keys = self.null.expand(rows, 1, -1)
        return self.kv(keys if text is None else torch.cat([keys, text.to(keys.dtype)], dim=1))

    def forward(self, h: Tensor, kv: Tensor, kv_mask: Tensor | None) -> None:
        self.mix(cross_attention(self.query(h), kv, self.num_heads, kv_mask, self.mix.input_scale), residual=h)
