"""The products of a block, with everything that stands beside a linear layer folded into its weights.

LN(h) @ W^T + b = norm(h) @ (W g)^T + (W @ s + b)         g, s: weight and bias of the LayerNorm; norm: LN without them
gamma (x @ W^T + b) = x @ (gamma W)^T + gamma b           LayerScale
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bldm_kernels.inference.attention import E4M3, E4M3_MAX, to_e4m3


class Product(nn.Module):
    """A linear layer of an engine. Its buffers: weight (N, K) in `dtype`, or e4m3 with a scale a row; bias float32 (N,).

    Args:
        linear: the layer.
        dtype: of weight and activations.
        norm: the LayerNorm before it, to be folded in.
        gamma: the LayerScale (N,) behind it.
        input_scale: float32 (1,): weight and input are e4m3, the input about `input_scale` times what is stored.
    """

    weight: Tensor
    bias: Tensor
    weight_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype,
        *,
        norm: nn.LayerNorm | None = None,
        gamma: Tensor | None = None,
        input_scale: Tensor | None = None,
    ):
        super().__init__()
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        self.dtype, self.eps = dtype, None if norm is None else norm.eps
        if norm is not None:
            bias = bias + weight @ norm.bias.detach().double()
            weight = weight * norm.weight.detach().double()
        if gamma is not None:
            weight, bias = weight * gamma.detach().double()[:, None], bias * gamma.detach().double()
        scale = None
        if input_scale is not None:
            scale = (weight.abs().amax(1) / E4M3_MAX).clamp(min=1e-30).float()
            weight = weight / scale.double()[:, None]
        self.register_buffer("weight", weight.to(dtype if input_scale is None else E4M3).contiguous())
        self.register_buffer("bias", bias.float())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", input_scale)

    def forward(
        self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, out_scale: Tensor | None = None
    ) -> Tensor:
        """x (..., K) -> (..., N).

        Args:
            x: in `dtype`; without a norm to fold and with an input_scale, e4m3.
            gelu: apply GELU.
            residual: contiguous (..., N): add to it in place, and return it.
            out_scale: float32 (1,): return e4m3, the result divided by it.
        """
        if self.eps is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            x = x if self.input_scale is None else to_e4m3(x, self.input_scale)
        if self.weight_scale is None or self.input_scale is None:
            y = F.linear(x, self.weight, self.bias.to(x.dtype))
        else:
            y = (F.linear(x.float(), self.weight.float()) * (self.weight_scale * self.input_scale) + self.bias).to(self.dtype)
        if gelu:
            y = F.gelu(y)
        if residual is not None:
            return residual.add_(y)
        return y if out_scale is None else to_e4m3(y, out_scale)
