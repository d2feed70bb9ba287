"""All blocks of an engine as one kernel, where there is one for the model and the batch is small."""

from collections.abc import Sequence

from torch import Tensor

from bldm_kernels.inference import layer_stack
from bldm_kernels.inference.layer_stack import Layer, LayerStack

from .blocks import EngineBlock
from .report import Part


class BlockStack:
    """The blocks of an engine. Their weights are laid out for the kernel, a second time, when a batch first needs them."""

    def __init__(self, blocks: Sequence[EngineBlock]):
        self.num_heads, self.eps = blocks[0].num_heads, blocks[0].qkv.eps
        layers = [_layer(block, self.eps) for block in blocks]
        self.layers = [layer for layer in layers if layer is not None and layer_stack.fits(layer)]
        self.takes_all = len(self.layers) == len(blocks)
        self._made: LayerStack | None = None

    def supports(self, h: Tensor) -> bool:
        """Whether the kernel takes this stream (B, T, W), without masks."""
        return self.takes_all and layer_stack.supports(h, self.num_heads)

    def __call__(self, h: Tensor) -> None:
        """Change h (B, T, W) in place; it is of those that `supports` takes."""
        if self._made is None:
            self._made = LayerStack(self.layers, self.eps)
        self._made(h.flatten(0, 1), len(h))

    def refresh(self) -> None:
        """Take over the weights that the blocks have now."""
        if self._made is not None:
            self._made.fill(self.layers)

    def report(self, h: Tensor) -> list[Part]:
        """The stack as a part, where the kernel takes one sample (1, T, W)."""
        return [Part("all blocks of a small batch", tuple(h.shape[1:]), "kernel")] if self.supports(h) else []


def _layer(block: EngineBlock, eps: float) -> Layer | None:
    """None for a block that the kernel has no place for: not in e4m3, with cross attention, or with norms of another eps."""
    qkv, proj, up, down = block.qkv, block.proj, block.expand, block.contract
    if block.cross is not None or qkv.stream_scale is None or up.stream_scale is None or {qkv.eps, up.eps} != {eps}:
        return None
    products = (qkv.weights, proj.weights, up.weights, down.weights)
    return Layer(*products, qkv.offset, up.offset, qkv.stream_scale, up.stream_scale)
