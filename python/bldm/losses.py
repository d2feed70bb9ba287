"""The training objective of a Bernoulli diffusion (Wang et al. 2023, section 3.2), on packed bits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bldm_kernels as bk

FORMS = ("plain", "balanced", "focal")
WEIGHTINGS = ("mean", "weighted")


@dataclass
class DiffusionLoss:
    """Noise, prediction and loss of one training step.

    Args:
        schedule: the forward process.
        prediction: "flip" or "x_0".
        form: "plain" binary cross entropy; "balanced" by class within each sample (the paper's code with focal = 0: its optimum
            is the true logit + log((1 - r) / r), so probabilities come out biased); "focal" is balanced with `focal_gamma`.
        focal_gamma: exponent of the focal form.
        weighting: "mean", or "weighted" by 1 - (t - 1) / T.
        posterior_kl: factor of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
        rule: reverse rule of that posterior.
    """

    schedule: bk.BernoulliSchedule
    prediction: str = "flip"
    form: str = "plain"
    focal_gamma: float = 1.0
    weighting: str = "mean"
    posterior_kl: float = 0.0
    rule: str = "plugin"

    def __post_init__(self) -> None:
        bk.checks.option("form", self.form, FORMS)
        bk.checks.option("weighting", self.weighting, WEIGHTINGS)
        bk.checks.option("prediction", self.prediction, ("flip", "x_0"))
        for name in ("posterior_kl", "focal_gamma"):
            if bk.checks.real(name, getattr(self, name)) < 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        steps = range(self.schedule.num_steps, 0, -1)
        table = self.schedule.coefficients(steps, self.rule, final="sample")
        self._rows = torch.cat([table.new_zeros(1, 4), table.flip(0)])  # row t: the step from t to t - 1
        self._flip = self.schedule.flip.float()

    def _move(self, device: torch.device) -> None:
        if self._flip.device != device:
            self._rows, self._flip = self._rows.to(device), self._flip.to(device)

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x_0: Tensor,
        num_bits: int,
        *,
        seed: int,
        step: int,
        label: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch of packed latents x_0 (B, ..., P); all randomness is that of (seed, step).

        Returns: {"loss": what to minimise, "bce": ..., and "posterior_kl" when it is used}.
        """
        device, total = x_0.device, self.schedule.num_steps
        self._move(device)
        # Drawn on the CPU from (seed, step): the same on every device, and nothing to save for a resumed run.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        t = torch.randint(1, total + 1, (len(x_0),), generator=generator).to(device, non_blocking=True)
        x_t = bk.add_noise(x_0, self._flip[t], seed=seed, step=step, num_bits=num_bits)
        logits = denoiser(x_t, t) if label is None else denoiser(x_t, t, label)
        weight = 1 - (t - 1).float() / total if self.weighting == "weighted" else None
        bce = bk.flip_loss(
            logits,
            x_0,
            x_t,
            weight=weight,
            focal_gamma={"plain": None, "balanced": 0.0, "focal": self.focal_gamma}[self.form],
            prediction=self.prediction,
        )
        losses = {"loss": bce, "bce": bce.detach()}
        if self.posterior_kl:
            kl = self._posterior_kl(logits, x_0, x_t, t, num_bits)
            losses["posterior_kl"] = kl.mean().detach()
            losses["loss"] = bce + self.posterior_kl * (kl if weight is None else kl * weight).mean()
        return losses

    def _posterior_kl(self, logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, num_bits: int) -> Tensor:
        """(B,) mean over the bits of KL between the true and the predicted flip of the step t -> t - 1."""
        rows = self._rows[t]
        p = bk.flip_probability(logits, x_t, rows, prediction=self.prediction).clamp(1e-6, 1 - 1e-6)
        n0, n1, d0, d1 = (c.view(-1, *[1] * (logits.dim() - 1)) for c in rows.unbind(-1))
        wrong = bk.unpack_bits(x_0 ^ x_t, num_bits, torch.bool)
        q = torch.where(wrong, (n0 + n1) / (d0 + d1).clamp(min=1e-12), n0 / d0).clamp(0, 1)
        # q log p apart from q log q: the gradient of xlogy(q, q / p) is 0 / 0 at q = 0.
        kl = torch.xlogy(q, q) - torch.xlogy(q, p) + torch.xlogy(1 - q, 1 - q) - torch.xlogy(1 - q, 1 - p)
        return kl.flatten(1).mean(1)
