"""A prepared linear layer as a module, so that its tensors are the engine's."""

import torch
from torch import Tensor, nn

from bldm_kernels.inference import norm, product
from bldm_kernels.inference.product import Weights

from .report import Part


class Product(nn.Module):
    """`gamma * linear(norm(h))`, prepared: arguments as of `bldm_kernels.inference.product.prepare`.

    Behind a norm, `offset` float32 (K,) is what the residual stream still lacks where this product reads it, see `set_offsets`;
    `stream_scale` is for kernels that read the stream itself as e4m3 (`bldm_kernels.inference.stream`, `layer_stack`).
    """

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None
    weight_scale: Tensor | None
    input_inverse: Tensor | None
    stream_scale: Tensor | None
    offset: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype,
        *,
        norm: nn.LayerNorm | None = None,
        gamma: Tensor | None = None,
        input_scale: Tensor | None = None,
        stream_scale: Tensor | None = None,
    ):
        super().__init__()
        for name, value in product.prepare(linear, dtype, norm=norm, gamma=gamma, input_scale=input_scale)._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("input_inverse", None if self.input_scale is None else self.input_scale.reciprocal())
        self.register_buffer("stream_scale", stream_scale)
        self.eps = 0.0 if norm is None else norm.eps
        self.register_buffer("offset", None if norm is None else torch.zeros(linear.in_features, device=self.bias.device))

    @property
    def weights(self) -> Weights:
        return Weights(self.weight, self.bias, self.input_scale, self.weight_scale)

    def read(self, h: Tensor, *, gelu: bool = False, reader: "Product | None" = None, pdl: bool = False) -> Tensor:
        """Of the residual stream (M, K), behind its norm: (M, N), as `reader` reads it if there is one, else in bfloat16."""
        x = norm.normalize(h, self.eps, offset=self.offset, out_scale=self.input_scale, pdl=pdl)
        scale = {} if reader is None else {"out_scale": reader.input_scale, "out_inverse": reader.input_inverse}
        return product.product(x, self.weights, gelu=gelu, pdl=pdl, **scale)

    def add(self, x: Tensor, h: Tensor, *, pdl: bool = False) -> None:
        """Of x (M, K), added to the residual stream (M, N) in place but for the bias, which the stream has from the start."""
        product.add_product(x, self.weights, h, pdl=pdl)

    def report(self, name: str, tokens: int) -> list[Part]:
        """What runs it, and its norm if there is one, for samples of this many tokens."""
        x = torch.empty(tokens, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        parts = [Part.of(name, x.shape, product.supports(x, self.weights))]
        if self.eps:
            h = torch.empty_like(x, dtype=self.bias.dtype)
            parts.insert(0, Part.of(f"norm of {name}", h.shape, norm.supports(h)))
        return parts
