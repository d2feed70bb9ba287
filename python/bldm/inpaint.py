"""Inpainting: which bits of an image's latent stay, for `FastSampler.sample(keep_mask=..., keep_bits=...)`."""

import torch
from torch import Tensor
from torch.nn import functional as F

import bldm_kernels as bk

from .autoencoder import BinaryAutoencoder


@torch.no_grad()
def inpainting_bits(autoencoder: BinaryAutoencoder, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(keep_mask, keep_bits), both packed uint8 (B, h, w, P).

    Args:
        images: (B, channels, H, W) in [-1, 1].
        masks: bool (B, H, W) or (H, W), True where to repaint; a position of the latent is repainted if any of its pixels is.
    """
    bk.checks.tensor("masks", masks, (torch.bool,), min_dim=2)
    if tuple(masks.shape[-2:]) != tuple(images.shape[-2:]) or masks.dim() > 3 or masks.shape[:-2].numel() not in (1, len(images)):
        raise ValueError(f"masks: expected shape (H, W) or (B, H, W) of images {tuple(images.shape)}, got {tuple(masks.shape)}")
    height, width, num_bits = autoencoder.latent_shape
    kept = autoencoder.encode(images)
    repainted = F.adaptive_max_pool2d(masks.float().reshape(-1, 1, *masks.shape[-2:]), (height, width))[:, 0] > 0
    mask = (~repainted).unsqueeze(-1).expand(len(images), height, width, num_bits)
    return bk.pack_bits(mask.to(torch.uint8).to(images.device)), kept
