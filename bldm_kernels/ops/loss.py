"""flip_loss: the training loss of a Bernoulli diffusion, straight from packed bits."""

from torch import Tensor

from .. import _shortcut, checks
from .diffusion import PREDICTIONS


def flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    *,
    weight: Tensor | None = None,
    focal_gamma: float | None = None,
    balanced: bool | None = None,
    prediction: str = "flip",
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of the logits against x_0 XOR x_t (flip prediction) or x_0 (x_0 prediction).

    Per bit: class_weight * q^focal_gamma * BCE, q the probability given to the wrong answer (Lin et al. 2017). The balanced form
    weighs set targets by 1 - r and the others by r, r being the fraction of set targets of the sample; it is the default of the
    paper's code (`focal_gamma=0`), and its optimum is the true logit + log((1 - r) / r). No intermediate reaches memory.

    Args:
        logits: (B, ..., C) float32, float16, bfloat16 or float64.
        x_0, x_t: uint8 (B, ..., ceil(C / 8)).
        weight: (B,) float32 factor a sample, for example 1 - (t - 1) / T.
        focal_gamma: >= 0, or None for no focal factor.
        balanced: class-balanced weights; default: exactly when focal_gamma is given, as in the paper's code.
        prediction: "flip" or "x_0".
        reduction: "mean" over all bits, "sum" over all bits, or "sample": the (B,) means over each sample's bits.

    Returns: a float32 scalar or (B,) (float64 for float64 logits), differentiable with respect to the logits (once).
    """
    checks.floating("logits", logits, min_dim=2)
    checks.packs("x_0", x_0, "logits", logits)
    checks.packs("x_t", x_t, "logits", logits)
    checks.option("prediction", prediction, PREDICTIONS)
    checks.option("reduction", reduction, ("mean", "sum", "sample"))
    gamma = 0.0 if focal_gamma is None else checks.real("focal_gamma", focal_gamma)
    if gamma < 0:
        raise ValueError(f"focal_gamma: expected >= 0 or None, got {gamma}")
    balanced = focal_gamma is not None if balanced is None else bool(balanced)
    if weight is not None:
        checks.floating("weight", weight)
        checks.shape("weight", weight, logits.shape[:1], "one a sample")
        checks.same_device("weight", weight, "logits", logits)
    options = (gamma, balanced, prediction == "x_0")
    if weight is None or not weight.requires_grad:
        return _shortcut.flip_loss(logits, x_0, x_t, weight, *options, reduction)[0]
    losses = _shortcut.flip_loss(logits, x_0, x_t, None, *options, "sample")[0] * weight
    if reduction == "sample":
        return losses
    if reduction == "mean":
        return losses.mean()
    return losses.sum() * (logits.numel() // max(logits.shape[0], 1))
