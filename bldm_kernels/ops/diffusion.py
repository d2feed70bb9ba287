"""The Bernoulli diffusion: flip_step (reverse), flip_probability, add_noise (forward)."""

import torch
from torch import Tensor

from .. import _shortcut, checks
from ..canonical import num_bytes

PREDICTIONS = ("flip", "x_0")


def check_coefficients(coefficients: Tensor, name: str, like: Tensor) -> None:
    checks.tensor("coefficients", coefficients, (torch.float32,))
    checks.same_device("coefficients", coefficients, name, like)
    if tuple(coefficients.shape) not in ((4,), (1, 4), (like.shape[0], 4)):
        raise ValueError(
            f"coefficients: expected shape (4,) or ({like.shape[0]}, 4), one row (n0, n1, d0, d1) for all samples or one "
            f"a sample, got {tuple(coefficients.shape)}"
        )


def _check_mask(name: str, value: Tensor, x_t: Tensor) -> None:
    checks.packed(name, value, min_dim=1)
    checks.same_device(name, value, "x_t", x_t)
    if tuple(value.shape) not in (tuple(x_t.shape), tuple(x_t.shape[1:]), (1, *x_t.shape[1:])):
        raise ValueError(
            f"{name}: expected packed bits of shape {tuple(x_t.shape)} like x_t, or {tuple(x_t.shape[1:])} for all "
            f"samples, got {tuple(value.shape)}"
        )


def check_kept(keep_mask: Tensor | None, keep_bits: Tensor | None, x_t: Tensor) -> None:
    if (keep_mask is None) != (keep_bits is None):
        missing = "keep_bits" if keep_bits is None else "keep_mask"
        raise ValueError(f"{missing}: expected together with {'keep_mask' if keep_bits is None else 'keep_bits'}, got None")
    if keep_mask is not None and keep_bits is not None:
        _check_mask("keep_mask", keep_mask, x_t)
        _check_mask("keep_bits", keep_bits, x_t)


def check_nonfinite(nonfinite: Tensor | None, name: str, like: Tensor) -> None:
    if nonfinite is not None:
        checks.tensor("nonfinite", nonfinite, (torch.int32,))
        checks.shape("nonfinite", nonfinite, (1,))
        checks.same_device("nonfinite", nonfinite, name, like)


def flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_offset: int | Tensor = 0,
    temperature: float = 1.0,
    prediction: str = "flip",
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    keep_mask: Tensor | None = None,
    keep_bits: Tensor | None = None,
    nonfinite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One reverse step x_t -> x_s: every bit is flipped with P(x_s != x_t) = (n0 + n1 f) / (d0 + d1 f).

    f = P(x_0 != x_t) is what the denoiser says: sigmoid(l / temperature) for flip prediction, sigmoid((1 - 2 x_t) l /
    temperature) for x_0 prediction (Wang et al. 2023, eq. 8 to 10). Guidance acts on the raw logits:
    l = l_uncond + guidance_scale (l - l_uncond).

    Args:
        logits: (B, ..., C) float32, float16, bfloat16 (or float64, on the reference).
        x_t: uint8 (B, ..., ceil(C / 8)).
        coefficients: float32 (4,), or (B, 4) for one row a sample: see `BernoulliSchedule.coefficients`.
        seed, step: the draw (docs/random-stream.md): ints, or one-element int64 tensors on the device of `logits`, so that a
            captured graph is replayed with new ones. 0 <= step < 2^28.
        sample_offset: index of the first sample of this batch; like `seed`, it may be a tensor.
        temperature: > 0.
        prediction: "flip" or "x_0".
        uncond_logits: logits without the condition, like `logits`.
        guidance_scale: s; 1 is plain conditional (the reference's own guidance g is s = 1 + g). Or a one-element float32 tensor
            on the device of `logits`.
        keep_mask, keep_bits: packed bits (B, ...) or for all samples: where the mask is 1 the result is `keep_bits`. What is
            in their padding does not count.
        nonfinite: int32 tensor of one element to which the number of non-finite logits is added, without a synchronisation.
            Without it, on a CPU, non-finite logits raise FloatingPointError; on a GPU they are not looked for.
        out: uint8 output, like x_t; it may be x_t itself.

    Returns: packed x_s, uint8 like x_t.

    Raises: TypeError, ValueError for a wrong argument; FloatingPointError as said above.
    """
    checks.floating("logits", logits, min_dim=2)
    checks.packs("x_t", x_t, "logits", logits)
    check_coefficients(coefficients, "logits", logits)
    checks.option("prediction", prediction, PREDICTIONS)
    temperature = checks.positive("temperature", temperature)
    guidance_value, guidance_tensor = checks.guidance_scale(guidance_scale, "logits", logits)
    if uncond_logits is not None:
        checks.tensor("uncond_logits", uncond_logits, (logits.dtype,))
        checks.shape("uncond_logits", uncond_logits, logits.shape, "like logits")
        checks.same_device("uncond_logits", uncond_logits, "logits", logits)
    elif guidance_tensor is not None or guidance_value != 1.0:
        scale = guidance_value if guidance_tensor is None else "a tensor"
        raise ValueError(f"guidance_scale: {scale} needs uncond_logits, got None")
    check_kept(keep_mask, keep_bits, x_t)
    check_nonfinite(nonfinite, "logits", logits)
    checks.out(out, x_t.shape, torch.uint8, "x_t", x_t)

    raises = nonfinite is None and logits.device.type == "cpu" and not torch.compiler.is_compiling()
    counter = torch.zeros(1, dtype=torch.int32) if raises else nonfinite
    seed_value, seed_tensor = checks.seed(seed, "logits", logits)
    step_value, step_tensor = checks.step(step, "logits", logits)
    offset_value, offset_tensor = checks.sample_offset_or_tensor(sample_offset, "logits", logits)
    arguments = (
        logits,
        x_t,
        coefficients,
        seed_value,
        step_value,
        offset_value,
        seed_tensor,
        step_tensor,
        offset_tensor,
        temperature,
        prediction == "x_0",
        uncond_logits,
        guidance_value,
        guidance_tensor,
        keep_mask,
        keep_bits,
        counter,
    )
    if out is None and counter is not None:
        out = torch.ops.bldm.flip_step(*arguments)
    else:  # torch.compile cannot lower an op that returns a tensor and whose only written argument is None
        out = torch.empty_like(x_t, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.bldm.flip_step_out(*arguments, out=out)
    if raises and counter is not None and (bad := int(counter)):
        raise FloatingPointError(f"logits: {bad} of {logits.numel()} are not finite at step {step}")
    return out


def flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, *, temperature: float = 1.0, prediction: str = "flip"
) -> Tensor:
    """P(x_s != x_t) = (n0 + n1 f) / (d0 + d1 f) of every bit, differentiable with respect to the logits.

    Arguments as in `flip_step`. Returns (B, ..., C) float32 (float64 for float64 logits).
    """
    checks.floating("logits", logits, min_dim=2)
    checks.packs("x_t", x_t, "logits", logits)
    check_coefficients(coefficients, "logits", logits)
    checks.option("prediction", prediction, PREDICTIONS)
    temperature = checks.positive("temperature", temperature)
    return _shortcut.flip_probability(logits, x_t, coefficients, temperature, prediction == "x_0")


def add_noise(
    x_0: Tensor,
    flip_probability: float | Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    num_bits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The forward process q(x_t | x_0): every bit flipped with the sample's probability (1 - k_t) / 2.

    Args:
        x_0: uint8 (B, ..., P).
        flip_probability: a number in [0, 1], or a float32 tensor of one element or (B,) on the device of x_0. A tensor's
            range is checked on a CPU; on a GPU that would need a synchronisation, so there values outside mean 0 or 1.
        seed, step, sample_offset: the draw, as in `flip_step`.
        num_bits: channels C, so that the padding bits of the last byte stay 0 (default: 8 P, no padding).
        out: uint8 output, like x_0; it may be x_0 itself.

    Returns: packed x_t, uint8 like x_0.
    """
    checks.packed("x_0", x_0)
    num_bits = 8 * x_0.shape[-1] if num_bits is None else checks.integer("num_bits", num_bits, 0, 2**31 - 1)
    if num_bytes(num_bits) != x_0.shape[-1]:
        raise ValueError(f"num_bits: {num_bits} bits take {num_bytes(num_bits)} bytes, x_0 has shape {tuple(x_0.shape)}")
    if isinstance(flip_probability, Tensor):
        checks.tensor("flip_probability", flip_probability, (torch.float32,))
        checks.same_device("flip_probability", flip_probability, "x_0", x_0)
        if tuple(flip_probability.shape) not in ((), (1,), (x_0.shape[0],)):
            raise ValueError(
                f"flip_probability: expected one element or shape ({x_0.shape[0]},), got {tuple(flip_probability.shape)}"
            )
        on_host = flip_probability.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not bool(((flip_probability >= 0) & (flip_probability <= 1)).all()):
            raise ValueError("flip_probability: expected values in [0, 1], got some outside")
    else:
        value = checks.real("flip_probability", flip_probability)
        if not 0 <= value <= 1:
            raise ValueError(f"flip_probability: expected a value in [0, 1], got {value}")
        flip_probability = torch.full((1,), value, dtype=torch.float32, device=x_0.device)
    checks.out(out, x_0.shape, torch.uint8, "x_0", x_0)
    seed_value, seed_tensor = checks.seed(seed, "x_0", x_0)
    step_value, step_tensor = checks.step(step, "x_0", x_0)
    offset = checks.sample_offset(sample_offset)
    arguments = (x_0, flip_probability, num_bits, seed_value, step_value, offset, seed_tensor, step_tensor)
    if out is None:
        return torch.ops.bldm.add_noise(*arguments)
    torch.ops.bldm.add_noise_out(*arguments, out=out)
    return out
