"""All layers of a small batch's transformer as one kernel: for so few rows that starting kernels takes most of their time.

The kernel (csrc/cuda/layer_stack.cu) is for compute capability 9.0, e4m3 products, width 768, 12 heads and an MLP four times as
wide.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks, dispatch
from ..backends.native import load_part
from .attention import E4M3, attention, to_e4m3
from .product import Weights, add_product
from .stream import plain_enter, plain_read, prepare_reader

WIDTH, HEADS, HIDDEN = 768, 12, 3072
COLUMNS, DEPTH = 128, 128  # of a stage of weights
ROWS = 56  # of a piece
SHAPES = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))  # of the weights
MOST_ROWS = 560  # two samples of 257 or 258; with more, kernels of their own are faster
MOST_TOKENS = 320


class Layer(NamedTuple):
    """A layer's products in e4m3, see `product.prepare`; what the stream lacks before its norms, float32 (W,), see `normalize`;
    and one-element float32 tensors: what the stream with that is divided by where a product reads it."""

    qkv: Weights
    proj: Weights
    up: Weights
    down: Weights
    qkv_offset: Tensor
    up_offset: Tensor
    qkv_stream: Tensor
    up_stream: Tensor


def plain(h: Tensor, layers: Sequence[Layer], batch: int, num_heads: int, eps: float) -> Tensor:
    """The specification: h (batch T, W), bfloat16 or float64, changed in place."""
    for layer in layers:
        qkv = norm_behind(h, layer.qkv, layer.qkv_offset, layer.qkv_stream, eps).to(h.dtype)
        mixed = attention(qkv.view(batch, -1, qkv.shape[1]), num_heads, None, layer.proj.input_scale)
        add_product(mixed.flatten(0, 1), _as_stream(layer.proj, h), h)
        inner = F.gelu(norm_behind(h, layer.up, layer.up_offset, layer.up_stream, eps))
        assert layer.down.input_scale is not None
        add_product(to_e4m3(inner, layer.down.input_scale), _as_stream(layer.down, h), h)
    return h


def norm_behind(h: Tensor, weights: Weights, offset: Tensor, stream: Tensor, eps: float) -> Tensor:
    """The layer's product behind its norm, of x = h + offset in e4m3: float32, or float64 for float64 h. See stream.py."""
    reader = prepare_reader(weights, eps, stream)
    return plain_read(plain_enter(h + offset, reader), reader)


def _as_stream(weights: Weights, h: Tensor) -> Weights:
    return weights._replace(bias=weights.bias.to(h.dtype))


def tiles(weight: Tensor) -> Tensor:
    """(N, K) -> (N / 128, K / 128, 128, 128), with the 16-byte chunks of row r's 128 bytes in the order c ^ r % 8."""
    rows, columns = weight.shape
    tiled = weight.view(rows // COLUMNS, COLUMNS, columns // DEPTH, DEPTH).transpose(1, 2)
    chunks = tiled.reshape(-1, COLUMNS, 8, DEPTH // 8)
    row, place = torch.arange(COLUMNS, device=weight.device)[:, None], torch.arange(8, device=weight.device)
    return chunks[:, row, place ^ row % 8].view(tiled.shape)


def fits(layer: Layer) -> bool:
    """Whether the kernel takes a layer of these weights."""
    return all(
        weights.weight.dtype == E4M3 and tuple(weights.weight.shape) == shape
        for weights, shape in zip(layer[:4], SHAPES, strict=True)
    )


def supports(h: Tensor, num_heads: int) -> bool:
    """Whether the kernel takes this stream, (B, T, W)."""
    part = load_part("cuda")[0]
    if not h.is_cuda or dispatch.forced_backend() not in (None, "cuda") or not hasattr(part, "layer_stack"):
        return False
    same = h.dtype == torch.bfloat16 and num_heads == HEADS and h.shape[2] == WIDTH and h.shape[1] <= MOST_TOKENS
    few = 0 < h.shape[:2].numel() <= MOST_ROWS and h.is_contiguous() and h.data_ptr() % 16 == 0
    return same and few and torch.cuda.get_device_capability(h.device) == (9, 0)


class LayerStack:
    """The layers, laid out for the kernel.

    Launches of as many rows on the same stream share scratch memory, and so do the graphs captured there: replay one at a time.

    Args:
        layers: products in e4m3 of the shapes above, on one GPU of compute capability 9.0.
        eps: of the norms.

    Raises: ValueError for layers that do not fit.
    """

    def __init__(self, layers: Sequence[Layer], eps: float):
        for i, layer in enumerate(layers):
            if not fits(layer):
                raise ValueError(f"layers[{i}]: expected e4m3 weights of shapes {SHAPES}")
        self.eps, self.num_layers = eps, len(layers)
        device = layers[0].qkv.weight.device
        self.weights = torch.empty(self.num_layers, sum(n * k for n, k in SHAPES), dtype=torch.uint8, device=device)
        self.vectors = torch.empty(self.num_layers, 2 * WIDTH + 3 * WIDTH + HIDDEN + 8, device=device)
        self._scratch: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.fill(layers)

    def fill(self, layers: Sequence[Layer]) -> None:
        """Take over the weights of as many layers, in place."""
        for layer, weights, vectors in zip(layers, self.weights, self.vectors, strict=True):
            torch.cat([tiles(product.weight.view(torch.uint8)).flatten() for product in layer[:4]], out=weights)
            of_columns = (layer.qkv_offset, layer.up_offset, layer.qkv.bias.float(), layer.up.bias.float())
            torch.cat([*of_columns, scalars(layer)], out=vectors)

    def __call__(self, h: Tensor, batch: int, *, times: Tensor | None = None) -> Tensor:
        """Change h in place. The first call of a shape may not be inside a capture.

        Args:
            h: contiguous bfloat16 (batch T, W), see `supports`.
            times: int64 (layers, 5, 5): the clock of the first block in qkv, attention, proj, up and down: when it begins to
                wait, has its first rows, has its sums (in the attention: the scores), has written them, and is done.

        Returns: h.

        Raises: ValueError for a stream that the kernel does not take; RuntimeError for a first call inside a capture.
        """
        if batch < 1 or len(h) % batch or not supports(h.view(batch, -1, h.shape[-1]), HEADS):
            raise ValueError(f"h: the kernel does not take shape {tuple(h.shape)}, {h.dtype}, on {h.device}, of {batch} samples")
        if times is not None:
            checks.tensor("times", times, (torch.int64,))
            checks.shape("times", times, (self.num_layers, 5, 5), "(layers, 5, 5)")
            checks.same_device("times", times, "h", h)
        stream = torch.cuda.current_stream(h.device).cuda_stream
        *scratch, counters = self._scratch_of(len(h), stream)
        address = [x.data_ptr() for x in (h, *scratch, self.weights, self.vectors, counters)]
        sizes = (len(h), len(h) // batch, self.num_layers, self.eps)
        clocks = 0 if times is None else times.data_ptr()
        load_part("cuda")[0].layer_stack(*address, *sizes, clocks, h.get_device(), stream)  # type: ignore[union-attr]
        return h

    def _scratch_of(self, rows: int, stream: int) -> tuple[Tensor, ...]:
        """Bytes of the stream, qkv, mixed and inner in tiles, moments, and the counters, which start at 0 and end there. Rows
        that only fill a tile up are 0."""
        if (rows, stream) not in self._scratch:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("layer_stack: call it once on this stream before a capture")
            device, padded = self.weights.device, -(-rows // ROWS) * ROWS
            widths = (WIDTH, 2 * 3 * WIDTH, WIDTH, HIDDEN)  # qkv is bfloat16
            made = [torch.zeros(padded, width, dtype=torch.uint8, device=device) for width in widths]
            moments = torch.empty(rows, 2 * WIDTH // COLUMNS, 2, device=device)
            count = load_part("cuda")[0].layer_stack_counters(rows, self.num_layers)  # type: ignore[union-attr]
            self._scratch[rows, stream] = (*made, moments, torch.zeros(count, dtype=torch.int32, device=device))
        return self._scratch[rows, stream]


def scalars(layer: Layer) -> Tensor:
    """float32 (8,): what values are multiplied by that become e4m3, and what the products of those are (enum Scalar)."""
    proj, down = layer.proj, layer.down
    assert proj.input_scale is not None and down.input_scale is not None
    read = (layer.qkv_stream, proj.input_scale, layer.up_stream, down.input_scale)
    scales = [weights.weight_scale for weights in layer[:4]]
    products = [scale * weight for scale, weight in zip(read, scales, strict=True) if weight is not None]
    streams = (layer.qkv_stream.reciprocal(), layer.up_stream.reciprocal())
    return torch.cat([*streams, *products, proj.input_scale.reciprocal(), down.input_scale.reciprocal()])
