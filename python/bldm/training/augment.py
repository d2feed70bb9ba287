"""Small random changes of place and size, for data sets of few images."""

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT, SCALE = 0.04, 0.06  # shares of the side: at most 2.6 pixels of 64, and 6% larger or smaller


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], each moved and scaled a little at random; the border is continued outwards."""
    draw = torch.rand(len(images), 3, generator=generator, device=images.device) * 2 - 1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + SCALE * draw[:, 0]
    theta[:, :, 2] = 2 * SHIFT * draw[:, 1:]  # the grid goes from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
