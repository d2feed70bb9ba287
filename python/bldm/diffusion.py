"""BinaryLatentDiffusion: autoencoder, denoiser and schedule as one model that paints images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import bldm_kernels as bk

from .autoencoder import BinaryAutoencoder
from .checkpoint import PretrainedModel
from .denoiser import BinaryDenoiser
from .painter import Painter

if TYPE_CHECKING:
    from .engine import DiffusionEngine


class BinaryLatentDiffusion(nn.Module, PretrainedModel, Painter):
    """A binary autoencoder with a Bernoulli diffusion over its bits (Wang et al., CVPR 2023).

    Args:
        autoencoder: arguments of `BinaryAutoencoder`.
        denoiser: arguments of `BinaryDenoiser`; positions, bits and steps default to the autoencoder's grid and `num_steps`.
        schedule: kind of the `BernoulliSchedule`.
        num_steps: T.
        prediction: "flip" or "x_0".
        class_names: names of the classes 0, 1, ... of a class-conditional model.
        text_encoder: name of the `bldm.text.TextEncoder` whose features a text-conditional model was trained with.
    """

    def __init__(
        self,
        autoencoder: dict[str, Any],
        denoiser: dict[str, Any],
        schedule: str = "linear",
        num_steps: int = 256,
        prediction: str = "flip",
        class_names: Sequence[str] | None = None,
        text_encoder: str | None = None,
    ):
        super().__init__()
        bk.checks.option("prediction", prediction, ("flip", "x_0"))
        self.autoencoder = BinaryAutoencoder(**autoencoder)
        *grid, num_bits = self.autoencoder.latent_shape
        fitting = {"num_positions": grid[0] * grid[1], "num_bits": num_bits, "num_steps": num_steps}
        self.denoiser = BinaryDenoiser(**{**fitting, **denoiser})
        self.schedule = bk.BernoulliSchedule(schedule, num_steps)
        self.prediction = prediction
        self.class_names = None if class_names is None else list(class_names)
        if self.class_names is not None and len(self.class_names) != (self.denoiser.num_classes or 0):
            raise ValueError(
                f"class_names: expected {self.denoiser.num_classes or 0} names, one a class, got {len(self.class_names)}"
            )
        if text_encoder is not None and self.denoiser.text_width is None:
            raise ValueError(f"text_encoder: this denoiser takes no text, expected None, got {text_encoder!r}")
        self.text_encoder = text_encoder

    def optimize(
        self, precision: str = "bf16", *, calibration: Tensor | None = None, calibration_cond: Tensor | None = None
    ) -> "DiffusionEngine":
        """Engines of denoiser and autoencoder, with this model's `sample`, `sampler`, `decode` and `encode`; see docs/engine.md.

        Args:
            precision, calibration, calibration_cond: as in `BinaryDenoiser.optimize`; the autoencoder runs in
                16 bits with "bf16" and "fp8", in float16 where its activations have room there.

        Raises: TypeError, ValueError naming the argument.
        """
        from .engine import DiffusionEngine

        return DiffusionEngine(self, precision, calibration, calibration_cond)
