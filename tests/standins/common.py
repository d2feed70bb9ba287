"""Fixed logits, and the reverse step of most samplers."""

import torch
from torch import Tensor, nn


class FixedLogits(nn.Module):
    """Logits of every bit as a fixed function of all bits, the time and a label; label -1 is "none"."""

    def __init__(self, num_bits: int, num_labels: int = 3, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_bits = num_bits
        self.register_buffer("coupling", 0.8 * torch.randn(num_bits, num_bits, generator=generator))
        self.register_buffer("drift", torch.randn(num_bits, generator=generator))
        self.register_buffer("labels", torch.randn(num_labels + 1, num_bits, generator=generator))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, ...) zeros and ones, (B,), (B,) -> (B, num_bits)."""
        logits = (2 * x.flatten(1).float() - 1) @ self.coupling + self.drift * torch.cos(0.7 * time.float())[:, None]
        return logits + self.labels[-1 if label is None else label]


def plugin(p: Tensor, x_t: Tensor, k_t: float, k_s: float) -> Tensor:
    """P(x_s = 1 | x_t) with p = P(x_0 = 1) put in for x_0: prior times likelihood, normalised over x_s."""
    kappa = k_t / k_s
    one = (k_s * p + (1 - k_s) / 2) * torch.where(x_t == 1, 1 + kappa, 1 - kappa)
    zero = (k_s * (1 - p) + (1 - k_s) / 2) * torch.where(x_t == 1, 1 - kappa, 1 + kappa)
    return one / (one + zero)


def of_ones(says: Tensor, x_t: Tensor, flip: bool) -> Tensor:
    """P(x_0 = 1) from what a model says: of flipping, or of x_0 itself."""
    return torch.where(x_t == 1, 1 - says, says) if flip else says
