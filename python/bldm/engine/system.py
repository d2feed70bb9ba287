"""DiffusionEngine: the engines of a whole model."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..painter import Painter
from ..sampling import FastSampler
from .report import Part

if TYPE_CHECKING:
    from ..diffusion import BinaryLatentDiffusion


class DiffusionEngine(Painter):
    """Made by `BinaryLatentDiffusion.optimize`: paints like the model. Later changes of the model's weights need `refresh`.

    It keeps its samplers, and with them their captured graphs: the first call for a batch size and number of steps takes longer.
    """

    def __init__(
        self,
        model: "BinaryLatentDiffusion",
        precision: str = "bf16",
        calibration: Tensor | None = None,
        calibration_cond: Tensor | None = None,
    ):
        self.schedule, self.prediction = model.schedule, model.prediction
        self.class_names, self.text_encoder = model.class_names, model.text_encoder
        self._training = {
            "calibration": calibration,
            "calibration_cond": calibration_cond,
            "schedule": model.schedule,
            "prediction": model.prediction,
        }
        self.denoiser = model.denoiser.optimize(precision, **self._training)
        self.autoencoder = model.autoencoder
        self._samplers: dict[str, FastSampler] = {}

    def refresh(self, model: "BinaryLatentDiffusion") -> None:
        """Take over the weights that `model`, of the same configuration, has now, calibrated as at first."""
        self.denoiser.refresh(model.denoiser, **self._training)
        self.autoencoder = model.autoencoder

    def _sampler_by(self, rule: str) -> FastSampler:
        if rule not in self._samplers:
            self._samplers[rule] = self.sampler(rule=rule)
        return self._samplers[rule]

    def report(self) -> tuple[Part, ...]:
        """What runs every part, so that a fallback to PyTorch is seen."""
        return self.denoiser.report()
