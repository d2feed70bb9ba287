"""flip_loss and its backward: logits and packed bits in, no intermediate but three sums a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BLOCK,
    INTERPRETED,
    NOT_SPECIALIZED,
    NUM_WARPS,
    bit_tile,
    byte_grid,
    byte_tile,
    on_device,
    store_rounded,
    unpack,
)
from .hamming import popcount

FINISH = 2048  # partial sums added up at a time
FINISH_WARPS = 8


@triton.jit
def _exp(x):
    """exp(x); results below 2^-126 are 0, which saves the three instructions that scale them."""
    y = x * 1.4426950408889634
    if INTERPRETED:
        return tl.exp2(y)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)): relative error 1e-7 however small x is."""
    r = x / (2 + x)
    s = r * r
    tail = s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))
    return 2 * r * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + tail))))


@triton.jit
def _sum_log1p(x):
    """[N, 8] in 0..1 -> [N]: the sum of log(1 + x) by one logarithm, of the product; less 1: that keeps small x."""
    n: tl.constexpr = x.shape[0]
    a, b = tl.split(tl.reshape(x, (n, 4, 2)))
    a, b = tl.split(tl.reshape(a * b + a + b, (n, 2, 2)))
    a, b = tl.split(a * b + a + b)
    product = a * b + a + b
    return tl.where(product < 1, _log1p(product), tl.log(1 + product))


@triton.jit
def _sum_tile(linear, tail, FOCAL: tl.constexpr):
    """Of [N, 8]: the sum of `linear` and, unless FOCAL, of log(1 + tail)."""
    rows = tl.sum(linear, axis=1)
    if not FOCAL:
        rows += _sum_log1p(tail)
    return tl.sum(rows, axis=0)


@triton.jit
def _load_margin(
    logits,
    x_0,
    x_t,
    sample,
    byte,
    exists,
    sample_bytes,
    row_bytes,
    num_bits,
    X0_PREDICTION: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
):
    """Margin m, target y (m is the logit, with its sign where y = 0), all [N, 8], where they lie, which exist; target bytes [N].

    What does not exist has an infinite margin: it adds nothing to a sum.
    """
    offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
    target = tl.load(x_0 + sample * sample_bytes + byte, exists, 0)
    if not X0_PREDICTION:
        target ^= tl.load(x_t + sample * sample_bytes + byte, exists, 0)
    y = unpack(target) != 0
    logit = tl.load(logits + offsets, valid, float("-inf")).to(tl.float32)
    return tl.where(y, logit, -logit), y, offsets, valid, target


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def loss_partials(
    logits,
    x_0,
    x_t,
    partials,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    gamma,
    BALANCED: tl.constexpr,
    FOCAL: tl.constexpr,
    X0_PREDICTION: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Of BYTES bytes of a sample: the loss; if BALANCED that where the target is set, where it is not, and how many are set."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, 1, BYTES)
    m, y, _, _, target = _load_margin(
        logits, x_0, x_t, sample, byte, exists, sample_bytes, row_bytes, num_bits, X0_PREDICTION, WHOLE_BYTES
    )
    tail, linear = _exp(-tl.abs(m)), tl.maximum(-m, 0.0)  # softplus(-m) = linear + log(1 + tail)
    if FOCAL:
        log1p = _log1p(tail)
        linear = (linear + log1p) * _exp(-gamma * (tl.maximum(m, 0.0) + log1p))  # q^gamma, as q = exp(-softplus(m))
    out = partials + tl.program_id(0)
    if BALANCED:
        plane = tl.num_programs(0)
        tl.store(out, _sum_tile(tl.where(y, linear, 0.0), tl.where(y, tail, 0.0), FOCAL))
        tl.store(out + plane, _sum_tile(tl.where(y, 0.0, linear), tl.where(y, 0.0, tail), FOCAL))
        tl.store(out + 2 * plane, tl.sum(popcount(target.to(tl.int32)), axis=0).to(tl.float32))
    else:
        tl.store(out, _sum_tile(linear, tail, FOCAL))


@triton.jit(do_not_specialize=["num_samples"])
def loss_finish(
    partials,
    weight,
    out,
    set_fraction,
    num_samples,
    blocks,
    sample_bits,
    factor,
    TOTAL: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE_STEPS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
):
    """The loss of every sample, or with TOTAL, by one program, their sum; always added up in the same order."""
    total = tl.zeros((SAMPLES,), tl.float32)
    plane = tl.cast(num_samples, tl.int64) * blocks
    for sample_step in range(SAMPLE_STEPS):
        sample = (tl.program_id(0) + sample_step) * SAMPLES + tl.arange(0, SAMPLES)
        exists = sample < num_samples
        set_sum, clear_sum, count = total * 0, total * 0, total * 0
        for block_step in range(BLOCK_STEPS):
            block = (block_step * BLOCKS + tl.arange(0, BLOCKS))[None, :]
            part = partials + sample.to(tl.int64)[:, None] * blocks + block
            valid = exists[:, None] & (block < blocks)
            set_sum += tl.sum(tl.load(part, valid, 0.0), axis=1)
            if set_fraction is not None:
                clear_sum += tl.sum(tl.load(part + plane, valid, 0.0), axis=1)
                count += tl.sum(tl.load(part + 2 * plane, valid, 0.0), axis=1)
        loss = set_sum
        if set_fraction is not None:
            r = count / tl.cast(sample_bits, tl.float32)
            tl.store(set_fraction + sample, r, exists)
            loss = (1 - r) * set_sum + r * clear_sum
        loss *= factor
        if weight is not None:
            loss *= tl.load(weight + sample, exists, 0.0)
        if TOTAL:
            total += loss
        else:
            tl.store(out + sample, loss, exists)
    if TOTAL:
        tl.store(out, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def loss_gradient(
    grad,
    logits,
    x_0,
    x_t,
    weight,
    set_fraction,
    out,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    gamma,
    factor,
    TOTAL: tl.constexpr,
    FOCAL: tl.constexpr,
    X0_PREDICTION: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """-sign * class weight * q^gamma (q + gamma (1 - q) softplus(-m)) * factor * weight * grad."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    m, y, offsets, valid, _ = _load_margin(
        logits, x_0, x_t, sample, byte, exists, sample_bytes, row_bytes, num_bits, X0_PREDICTION, WHOLE_BYTES
    )
    if FOCAL:
        e = _exp(-tl.abs(m))
        log1p = _log1p(e)
        q = tl.where(m > 0, e, 1.0) * _reciprocal(1 + e)
        softplus = tl.maximum(-m, 0.0) + log1p
        slope = _exp(-gamma * (tl.maximum(m, 0.0) + log1p)) * (q + gamma * (1 - q) * softplus)
    else:
        slope = _reciprocal(1 + _exp(m))
    scale = tl.load(grad if TOTAL else grad + sample, None if TOTAL else exists) * factor
    if weight is not None:
        scale *= tl.load(weight + sample, exists, 0.0)
    if set_fraction is None:
        scale += tl.zeros_like(byte)
        slope *= tl.where(y, -scale[:, None], scale[:, None])
    else:
        r = tl.load(set_fraction + sample, exists, 0.0)
        slope *= tl.where(y, ((r - 1) * scale)[:, None], (r * scale)[:, None])
    store_rounded(out + offsets, slope, valid)


def flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    x0_prediction: bool,
    factor: float,
    out: Tensor,
    set_fraction: Tensor | None,
) -> None:
    num_samples, rows, row_bytes = x_0.shape
    num_bits = logits.shape[-1]
    sample_bytes = rows * row_bytes
    num_bytes = min(triton.next_power_of_2(sample_bytes), BLOCK)
    blocks = triton.cdiv(sample_bytes, num_bytes)
    programs = num_samples * blocks
    partials = torch.empty(programs if set_fraction is None else 3 * programs, dtype=torch.float32, device=logits.device)
    total = out.dim() == 0
    finish_blocks = min(triton.next_power_of_2(blocks), FINISH)
    samples = FINISH // finish_blocks
    steps = triton.cdiv(num_samples, samples)
    with on_device(logits):
        loss_partials[(programs,)](
            logits,
            x_0,
            x_t,
            partials,
            num_samples,
            sample_bytes,
            row_bytes,
            num_bits,
            focal_gamma,
            BALANCED=set_fraction is not None,
            FOCAL=focal_gamma != 0,
            X0_PREDICTION=x0_prediction,
            WHOLE_BYTES=num_bits % 8 == 0,
            BYTES=num_bytes,
            num_warps=NUM_WARPS,
        )
        loss_finish[(1 if total else steps,)](
            partials,
            weight,
            out,
            set_fraction,
            num_samples,
            blocks,
            rows * num_bits,
            factor,
            TOTAL=total,
            SAMPLES=samples,
            BLOCKS=finish_blocks,
            SAMPLE_STEPS=triton.next_power_of_2(steps) if total else 1,  # a few values: each is compiled
            BLOCK_STEPS=triton.next_power_of_2(triton.cdiv(blocks, finish_blocks)),
            num_warps=FINISH_WARPS,
        )


def flip_loss_backward(
    grad: Tensor,
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    set_fraction: Tensor | None,
    focal_gamma: float,
    x0_prediction: bool,
    factor: float,
    out: Tensor,
) -> None:
    num_samples, rows, row_bytes = x_0.shape
    num_bits = logits.shape[-1]
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(logits):
        loss_gradient[grid](
            grad,
            logits,
            x_0,
            x_t,
            weight,
            set_fraction,
            out,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            focal_gamma,
            factor,
            TOTAL=grad.dim() == 0,
            FOCAL=focal_gamma != 0,
            X0_PREDICTION=x0_prediction,
            WHOLE_BYTES=num_bits % 8 == 0,
            **tile,
        )
