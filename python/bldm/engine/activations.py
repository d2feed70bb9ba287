"""How large the activations of an autoencoder become, and so whether float16 has room for them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import bldm_kernels as bk

if TYPE_CHECKING:
    from ..autoencoder import BinaryAutoencoder

ROOM = 16  # float16 is taken for activations that stay this far below its end


@torch.no_grad()
def largest_activation(autoencoder: "BinaryAutoencoder", num_images: int = 2) -> float:
    """The largest size of what a module of the float32 model reads or computes: decoding random bits, encoding the images."""
    largest: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        largest.extend(x.abs().amax().float() for x in (*inputs, output) if isinstance(x, Tensor))

    modules = (*autoencoder.decoder.modules(), *autoencoder.encoder.modules())
    handles = [module.register_forward_hook(look) for module in modules]
    device = autoencoder.embedding.device
    height, width, num_bits = autoencoder.latent_shape
    try:
        images = autoencoder.decode(bk.random_bits(num_images, (height, width, num_bits), seed=0, device=device))
        autoencoder.encode_logits(images.clamp(-1, 1))
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(largest).amax())


def precision_of(autoencoder: "BinaryAutoencoder") -> str:
    """Float16 ("fp16") where its rounding, an eighth of the other's, costs no range; else, or if they are not finite, "bf16"."""
    limit = torch.finfo(torch.float16).max / ROOM
    return "fp16" if largest_activation(autoencoder) < limit else "bf16"
