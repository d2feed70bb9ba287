"""flip_loss and its backward: logits and packed bits in, no intermediate but a few sums a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCK, NOT_SPECIALIZED, NUM_WARPS, bit_tile, byte_grid, byte_tile, on_device, store_rounded, unpack
from .hamming import set_bits

PARTIALS = 256  # partial sums added up at a time


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)): relative error 1e-7 however small x is."""
    r = x / (2 + x)
    s = r * r
    tail = s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))
    return 2 * r * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + tail))))


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
    """Margin m, target y (m is the logit, with its sign where y = 0), where they lie, which exist: all [N, 8]."""
    offsets, valid = bit_tile(sample, byte, exists, sample_bytes, row_bytes, num_bits, WHOLE_BYTES)
    target = tl.load(x_0 + sample * sample_bytes + byte, exists, 0)
    if not X0_PREDICTION:
        target ^= tl.load(x_t + sample * sample_bytes + byte, exists, 0)
    y = unpack(target) != 0
    logit = tl.load(logits + offsets, valid, 0.0).to(tl.float32)
    return tl.where(y, logit, -logit), y, offsets, valid


@triton.jit
def _softplus_pair(m):
    """softplus(-m), softplus(m) and sigmoid(-m)."""
    e = tl.exp(-tl.abs(m))
    tail = _log1p(e)
    return tl.maximum(-m, 0.0) + tail, tl.maximum(m, 0.0) + tail, tl.where(m > 0, e, 1.0) / (1 + e)


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
    FOCAL: tl.constexpr,
    X0_PREDICTION: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Of BYTES bytes of a sample: the loss where the target is set, where it is not, and how many are set."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, 1, BYTES)
    m, y, _, valid = _load_margin(
        logits, x_0, x_t, sample, byte, exists, sample_bytes, row_bytes, num_bits, X0_PREDICTION, WHOLE_BYTES
    )
    loss, softplus_m, _ = _softplus_pair(m)
    if FOCAL:
        loss *= tl.exp(-gamma * softplus_m)  # q^gamma, as q = exp(-softplus(m))
    loss = tl.where(valid, loss, 0.0)
    out = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(out, tl.sum(tl.sum(tl.where(y, loss, 0.0), axis=1), axis=0))
    tl.store(out + 1, tl.sum(tl.sum(tl.where(y, 0.0, loss), axis=1), axis=0))
    tl.store(out + 2, tl.sum(tl.sum((y & valid).to(tl.float32), axis=1), axis=0))


@triton.jit
def sum_partials(partials, out, blocks, sample_bits, BALANCED: tl.constexpr, PARTIALS: tl.constexpr, STEPS: tl.constexpr):
    """The loss of a sample, always added up in the same order."""
    sample = tl.program_id(0).to(tl.int64)
    ones, zeros = tl.zeros((PARTIALS,), tl.float32), tl.zeros((PARTIALS,), tl.float32)
    count = tl.zeros((PARTIALS,), tl.int64)
    for step in range(STEPS):
        block = step * PARTIALS + tl.arange(0, PARTIALS)
        part = partials + (sample * blocks + block) * 3
        ones += tl.load(part, block < blocks, 0.0)
        zeros += tl.load(part + 1, block < blocks, 0.0)
        count += tl.load(part + 2, block < blocks, 0.0).to(tl.int64)
    total, rest = tl.sum(ones, axis=0), tl.sum(zeros, axis=0)
    size = tl.cast(sample_bits, tl.float32)
    if BALANCED:
        r = tl.sum(count, axis=0).to(tl.float32) / size
        total, rest = total * (1 - r), rest * r
    tl.store(out + sample, (total + rest) / size)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def loss_gradient(
    grad,
    logits,
    x_0,
    x_t,
    count,
    out,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    sample_bits,
    gamma,
    FOCAL: tl.constexpr,
    X0_PREDICTION: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """-sign * class weight * q^gamma (q + gamma (1 - q) softplus(-m)) * grad / (R C); `count` only where balanced."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    m, y, offsets, valid = _load_margin(
        logits, x_0, x_t, sample, byte, exists, sample_bytes, row_bytes, num_bits, X0_PREDICTION, WHOLE_BYTES
    )
    loss, softplus_m, q = _softplus_pair(m)
    if FOCAL:
        q = tl.exp(-gamma * softplus_m) * (q + gamma * (1 - q) * loss)
    size = tl.cast(sample_bits, tl.float32)
    scale = (tl.load(grad + sample, exists, 0.0).to(tl.float32) / size)[:, None]
    if count is None:
        weight = tl.where(y, -scale, scale)
    else:
        r = (tl.load(count + sample, exists, 0).to(tl.float32) / size)[:, None]
        weight = tl.where(y, (r - 1) * scale, r * scale)
    store_rounded(out + offsets, weight * q, valid)


def flip_loss(
    logits: Tensor, x_0: Tensor, x_t: Tensor, focal_gamma: float, balanced: bool, x0_prediction: bool, out: Tensor
) -> None:
    num_samples, rows, row_bytes = x_0.shape
    num_bits = logits.shape[-1]
    num_bytes = min(triton.next_power_of_2(rows * row_bytes), BLOCK)
    blocks = triton.cdiv(rows * row_bytes, num_bytes)
    partials = torch.empty((num_samples, blocks, 3), dtype=torch.float32, device=logits.device)
    with on_device(logits):
        loss_partials[(num_samples * blocks,)](
            logits,
            x_0,
            x_t,
            partials,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            focal_gamma,
            FOCAL=focal_gamma != 0,
            X0_PREDICTION=x0_prediction,
            WHOLE_BYTES=num_bits % 8 == 0,
            BYTES=num_bytes,
            num_warps=NUM_WARPS,
        )
        sum_partials[(num_samples,)](
            partials,
            out,
            blocks,
            rows * num_bits,
            BALANCED=balanced,
            PARTIALS=PARTIALS,
            STEPS=triton.cdiv(blocks, PARTIALS),
            num_warps=NUM_WARPS,
        )


def flip_loss_backward(
    grad: Tensor,
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    out: Tensor,
) -> None:
    num_samples, rows, row_bytes = x_0.shape
    num_bits = logits.shape[-1]
    count = None
    if balanced:
        count = torch.empty(num_samples, dtype=torch.int32, device=logits.device)
        set_bits(x_0.flatten(1), None if x0_prediction else x_t.flatten(1), count)
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(logits):
        loss_gradient[grid](
            grad,
            logits,
            x_0,
            x_t,
            count,
            out,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            rows * num_bits,
            focal_gamma,
            FOCAL=focal_gamma != 0,
            X0_PREDICTION=x0_prediction,
            WHOLE_BYTES=num_bits % 8 == 0,
            **tile,
        )
