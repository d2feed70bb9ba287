"""The residual stream on its way through the blocks of an engine.

A block reads it and adds to it, and does not know which way that goes: with a pass for the norm in front of every product that
reads (`NormedStream`), or, where the kernels take it and are faster, with products that leave what the next reader's norm needs
(`LinkedStream`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bldm_kernels.inference import stream as kernels
from bldm_kernels.inference.attention import E4M3, attention
from bldm_kernels.inference.product import Weights
from bldm_kernels.inference.stream import Reader

from ..parts import part
from .products import Product
from .report import Part


class NormedStream:
    """The stream h (M, W). Whoever reads it takes its norm first."""

    def __init__(self, h: Tensor, pdl: bool):
        self.h, self.pdl = h, pdl

    def read(self, product: Product, *, gelu: bool = False, reader: Product | None = None) -> Tensor:
        return product.read(self.h, gelu=gelu, reader=reader, pdl=self.pdl)

    def attend(self, qkv: Product, num_heads: int, batch: int, mask: Tensor | None, reader: Product) -> Tensor:
        """Attention of the tokens that are there (mask, bool (B, T); None: all), as `reader` reads it: (M, W)."""
        with part("qkv"):
            made = self.read(qkv)
        return _mixed(made, num_heads, batch, mask, reader, self.pdl)

    def add(self, product: Product, x: Tensor) -> None:
        product.add(x, self.h, pdl=self.pdl)


class Stage(NamedTuple):
    """A product that reads the stream and the one that then adds to it, and both as the kernels want them."""

    reads: Product
    adds: Product
    reader: Reader
    adder: Weights


class LinkedStream:
    """The stream h (M, W). Whoever adds to it leaves what the reader of the next stage needs; behind the last one is the head,
    which reads h itself. It has every bias from the product that it belongs to: those it came with are taken off first."""

    def __init__(self, h: Tensor, stages: Sequence[Stage], pdl: bool):
        self.pdl, self._ahead = pdl, iter(stages)
        self._stage = next(self._ahead)
        self._stream = kernels.enter(h, self._stage.reader, self._stage.reads.offset, pdl=pdl)

    def read(self, product: Product, *, gelu: bool = False, reader: Product | None = None) -> Tensor:
        assert product is self._stage.reads
        scale = None if reader is None else reader.input_scale
        return kernels.read(self._stream, self._stage.reader, gelu=gelu, out_scale=scale, pdl=self.pdl)

    def attend(self, qkv: Product, num_heads: int, batch: int, mask: Tensor | None, reader: Product) -> Tensor:
        """As of NormedStream."""
        stage, scale = self._stage, reader.input_scale
        if mask is None and kernels.supports_heads(self._stream.h, stage.reader, num_heads, batch):
            with part("qkv and attention"):
                return kernels.attend(self._stream, stage.reader, num_heads, batch, out_scale=scale, pdl=self.pdl)
        with part("qkv"):
            made = self.read(qkv)
        return _mixed(made, num_heads, batch, mask, reader, self.pdl)

    def add(self, product: Product, x: Tensor) -> None:
        assert product is self._stage.adds
        adder, following = self._stage.adder, next(self._ahead, None)
        self._stream = kernels.add(x, adder, self._stream, None if following is None else following.reader, pdl=self.pdl)
        if following is not None:
            self._stage = following


def _mixed(qkv: Tensor, num_heads: int, batch: int, mask: Tensor | None, reader: Product, pdl: bool) -> Tensor:
    with part("attention"):
        return attention(qkv.view(batch, -1, qkv.shape[1]), num_heads, mask, reader.input_scale, pdl=pdl).flatten(0, 1)


ResidualStream = NormedStream | LinkedStream


class StreamKernels:
    """The products of an engine as the kernels want them: laid out, a second time, when a batch first needs them.

    The first layout stays, for batches that cuBLASLt and Triton's kernels do: in the other order of rows they would write
    columns in an order that attention and the next product do not read.

    Args:
        stages: the products that read the stream, each with the one that then adds to it, of all blocks in their order.
    """

    def __init__(self, stages: Sequence[tuple[Product, Product]]):
        self.stages = stages
        self.low = stages[0][0].weight.dtype == E4M3
        self.takes_all = all(kernels.fits(product.weight) for stage in stages for product in stage)
        self._made: list[Stage] | None = None

    def supports(self, h: Tensor) -> bool:
        """Whether the kernels take this stream (B, T, W) and are the faster way."""
        return self.takes_all and kernels.supports(h.flatten(0, 1), self.low)

    def stream(self, h: Tensor, pdl: bool) -> ResidualStream:
        """h (B, T, W) for the blocks, which change it in place. The first call may not be inside a capture.

        Raises: RuntimeError for a first call inside a capture.
        """
        if not self.supports(h):
            return NormedStream(h.flatten(0, 1), pdl)
        if self._made is None:
            if h.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("engine: call it once with this many samples before a capture")
            self._made = [_laid_out(*stage) for stage in self.stages]
        return LinkedStream(h.flatten(0, 1), self._made, pdl)

    def refresh(self) -> None:
        """Take over the weights, offsets and scales that the products have now, in place."""
        if self._made is not None:
            for stage in self._made:
                fresh = _laid_out(stage.reads, stage.adds)
                for mine, value in zip((*stage.reader, *stage.adder), (*fresh.reader, *fresh.adder), strict=True):
                    if isinstance(mine, Tensor) and isinstance(value, Tensor):
                        mine.copy_(value)

    def report(self, h: Tensor) -> list[Part]:
        """The products as a part, where the kernels take one sample (1, T, W)."""
        runs = self.takes_all and kernels.takes(h.flatten(0, 1))
        return [Part("products and norms of a large batch", tuple(h.shape[1:]), "kernel")] if runs else []


def _laid_out(reads: Product, adds: Product) -> Stage:
    reader = kernels.prepare_reader(reads.weights, reads.eps, reads.stream_scale)
    return Stage(reads, adds, reader, kernels.prepare_adder(adds.weights))
