"""DiffusionEngine: the engines of a whole model."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..painter import Painter
from ..sampling import FastSampler
from .activations import precision_of
from .autoencoder import AutoencoderEngine
from .report import Part

if TYPE_CHECKING:
    from ..autoencoder import BinaryAutoencoder
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
        self.autoencoder = self._autoencoder_of(model)
        self._samplers: dict[str, FastSampler] = {}

    def refresh(self, model: "BinaryLatentDiffusion") -> None:
        """Take over the weights that `model`, of the same configuration, has now, calibrated as at first.

        In place, so that captured graphs follow, unless the autoencoder now needs another of the two 16-bit types.
        """
        self.denoiser.refresh(model.denoiser, **self._training)
        engine = self.autoencoder
        if isinstance(engine, AutoencoderEngine) and engine.precision == precision_of(model.autoencoder):
            engine.refresh(model.autoencoder)
        else:
            self.autoencoder = self._autoencoder_of(model)

    def _autoencoder_of(self, model: "BinaryLatentDiffusion") -> "BinaryAutoencoder | AutoencoderEngine":
        return model.autoencoder if self.denoiser.precision == "float32" else model.autoencoder.optimize()

    def _sampler_by(self, rule: str) -> FastSampler:
        if rule not in self._samplers:
            self._samplers[rule] = self.sampler(rule=rule)
        return self._samplers[rule]

    def report(self) -> tuple[Part, ...]:
        """What runs every part, so that a fallback to PyTorch is seen."""
        decoding = self.autoencoder.report() if isinstance(self.autoencoder, AutoencoderEngine) else ()
        return (*self.denoiser.report(), *decoding)
