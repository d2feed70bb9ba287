"""flip_probability and its backward."""

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    NOT_SPECIALIZED,
    bit_tile,
    byte_grid,
    byte_tile,
    exp2_scale,
    exp_neg,
    fma,
    load_coefficients,
    on_device,
    store_rounded,
    unpack,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def probability(
    grad,
    logits,
    x_t,
    coefficients,
    out,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    scale,
    inverse_temperature,
    X0_PREDICTION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """P = N / D, N = n0 (1 + e) + n1 and D = d0 (1 + e) + d1; with `grad`, grad (n1 d0 - n0 d1) e / (D^2 T)."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
    flip_logits = tl.load(logits + offsets, valid, 0.0).to(tl.float32)
    if X0_PREDICTION:
        negative = unpack(tl.load(x_t + sample * sample_bytes + byte, exists, 0)) != 0
        flip_logits = tl.where(negative, -flip_logits, flip_logits)
    e = exp_neg(flip_logits, scale)
    n0, n1, d0, d1 = load_coefficients(coefficients, sample, exists, PER_SAMPLE)
    denominator = fma(d0, e, d0 + d1)
    if grad is None:
        result = tl.div_rn(fma(n0, e, n0 + n1), denominator)
    else:
        slope = (n1 * d0 - n0 * d1) * inverse_temperature * tl.div_rn(tl.div_rn(e, denominator), denominator)
        result = tl.load(grad + offsets, valid, 0.0) * slope
        if X0_PREDICTION:
            result = tl.where(negative, -result, result)
    store_rounded(out + offsets, result, valid)


def _launch(
    grad: Tensor | None,
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    temperature: float,
    x0_prediction: bool,
    out: Tensor,
) -> None:
    num_samples, rows, row_bytes = x_t.shape
    num_bits = logits.shape[-1]
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(logits):
        probability[grid](
            grad,
            logits,
            x_t,
            coefficients,
            out,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            exp2_scale(temperature),
            1 / temperature,
            X0_PREDICTION=x0_prediction,
            PER_SAMPLE=coefficients.shape[0] > 1,
            WHOLE_BYTES=num_bits % 8 == 0,
            enable_fp_fusion=False,
            **tile,
        )


def flip_probability(
    logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool, out: Tensor
) -> None:
    _launch(None, logits, x_t, coefficients, temperature, x0_prediction, out)


def flip_probability_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    temperature: float,
    x0_prediction: bool,
    out: Tensor,
) -> None:
    _launch(grad, logits, x_t, coefficients, temperature, x0_prediction, out)
