"""What the three methods share on each data set, and what is each one's own."""

from dataclasses import dataclass, field
from typing import Any

METHODS = {
    "binary": "binary latents, Bernoulli diffusion",
    "tokens": "VQ tokens, masked prediction",
    "gaussian": "Gaussian latents, DDIM",
}


@dataclass(frozen=True)
class Setting:
    """A position has `bits` bits, or codebooks * log2(codes), about as many, or `channels` real numbers (a channel for 4 bits).

    pad: pixels added on each side in training, and taken off before judging. copies: augmented ones of each image.
    autoencoder_lr, lr, batch sizes: of the two stages. minutes: of training, for each stage.
    """

    image_size: int
    convnet: dict[str, Any]
    transformer: dict[str, Any]
    bits: int
    codebooks: int
    codes: int
    channels: int
    autoencoder_batch: int
    autoencoder_lr: float
    batch: int
    lr: float
    guidance: tuple[float, ...]
    minutes: tuple[float, float] = (2.0, 4.0)
    pad: int = 0
    flip_latents: bool = False
    augmented: bool = False
    copies: int = 0
    steps: tuple[int, ...] = field(default=(4, 8, 16, 32, 64))

    def autoencoder(self, method: str) -> dict[str, Any]:
        """Arguments of the method's autoencoder."""
        own = {
            "binary": {"num_bits": self.bits, "mode": "threshold"},
            "tokens": {"codebooks": self.codebooks, "codes": self.codes},
            "gaussian": {"channels": self.channels},
        }
        return {"image_size": self.image_size, **self.convnet, **own[method]}


SETTINGS = {
    "fashion_mnist": Setting(
        image_size=32,
        pad=2,
        convnet={"in_channels": 1, "base_channels": 32, "channel_multipliers": (1, 2, 4)},
        transformer={"width": 192, "depth": 9, "num_heads": 6, "dropout": 0.05},
        bits=16,
        codebooks=2,
        codes=256,
        channels=4,
        autoencoder_batch=512,
        autoencoder_lr=2e-3,
        batch=512,
        lr=1e-3,
        guidance=(1.0, 2.0),
        flip_latents=True,
    ),
    "emoji": Setting(
        image_size=64,
        convnet={"in_channels": 3, "base_channels": 32, "channel_multipliers": (1, 2, 4, 4), "attention": True},
        transformer={"width": 384, "depth": 6, "num_heads": 6, "dropout": 0.1},
        bits=64,
        codebooks=9,
        codes=128,
        channels=16,
        autoencoder_batch=256,
        autoencoder_lr=1e-3,
        batch=1024,
        lr=1e-3,
        guidance=(1.0, 3.0),
        augmented=True,
        copies=15,
    ),
}
