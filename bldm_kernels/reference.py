"""The specification: every op of this package in plain PyTorch, one readable function each.

Shapes are the canonical ones the dispatcher hands to every backend: B samples, R positions (rows) a sample, C bits a
position, P = ceil(C / 8) packed bytes a position. float64 logits are computed in float64; everything else follows the
float32 arithmetic of docs/random-stream.md to the last bit, so that all backends can agree exactly.
"""

import math

import torch
from torch import Tensor

PURPOSE_RANDOM_BITS, PURPOSE_FLIP_STEP, PURPOSE_ADD_NOISE, PURPOSE_BINARIZE = 0, 2, 4, 6
STEP_BITS = 28
MASK_32 = 0xFFFFFFFF
EXP2_COEFFICIENTS = tuple(
    float.fromhex(c) for c in ("0x1.62e42ap-1", "0x1.ebf9bcp-3", "0x1.c6b752p-5", "0x1.3cea88p-7", "0x1.5bba14p-10")
)


# --- packed bits -----------------------------------------------------------------------------------------------------
def pack_bits(x: Tensor) -> Tensor:
    """(..., C) of any dtype -> (..., P) uint8: numpy.packbits(x, axis=-1, bitorder="little")."""
    bits = torch.nn.functional.pad((x != 0).to(torch.int32), (0, -x.shape[-1] % 8))
    weights = 1 << torch.arange(8, device=x.device, dtype=torch.int32)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, num_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., P) uint8 -> (..., num_bits) of `dtype`, 0 or 1."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :num_bits].to(dtype)


# --- the random stream (docs/random-stream.md) -----------------------------------------------------------------------
def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two uint32 (held in int64)."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (a * b) & MASK_32


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Random123 on uint32 words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mulhilo(0xD2511F53, c0)
        high1, low1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return c0, c1, c2, c3


def random_lanes(
    num_samples: int, num_bytes: int, purpose: int, seed: Tensor, step: Tensor, sample_offset: int | Tensor, device: torch.device
) -> Tensor:
    """(B, num_bytes, 8) int64: the eight 16-bit lanes of every packed byte's Philox block."""
    sample = (sample_offset + torch.arange(num_samples, device=device)).unsqueeze(1)
    byte = torch.arange(num_bytes, device=device).expand(num_samples, -1)
    draw = ((purpose << STEP_BITS) + step).expand_as(byte)
    sample = sample.expand_as(byte)
    words = philox_4x32_10((byte, draw, sample & MASK_32, (sample >> 32) & MASK_32), (seed & MASK_32, (seed >> 32) & MASK_32))
    return torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once: in float32 the product is exact in float64."""
    if a.dtype == torch.float64:
        return a * b + c
    return (a.double() * b.double() + c.double()).float()


def bernoulli_bits(
    numerator: Tensor, denominator: Tensor, num_bits: int, purpose: int, seed: Tensor, step: Tensor, sample_offset: int | Tensor
) -> Tensor:
    """(B, R, C) bool, True with probability numerator / denominator (each broadcast to (B, R, C))."""
    shape = torch.broadcast_shapes(numerator.shape, denominator.shape)
    num_samples, rows, num_bytes = shape[0], shape[1], -(-num_bits // 8)

    def lanes(which: int) -> Tensor:
        lane = random_lanes(num_samples, rows * num_bytes, which, seed, step, sample_offset, numerator.device)
        return lane.view(num_samples, rows, num_bytes * 8)[..., :num_bits].to(numerator.dtype)

    scaled = denominator * 2.0**-16
    remainder = fma(-lanes(purpose), scaled, numerator)
    return fma(-lanes(purpose + 1), scaled * 2.0**-16, remainder) > 0


def exp_neg(logits: Tensor, temperature: float) -> Tensor:
    """exp(-logits / temperature), clamped to 2^-64..2^64: in float32 by fused multiply-adds only, the same everywhere."""
    y = (logits * (-math.log2(math.e) / temperature)).clamp(-64, 64)
    if logits.dtype == torch.float64:
        return torch.exp2(y)
    n = torch.round(y)
    z = y - n
    c1, c2, c3, c4, c5 = (torch.full_like(z, c) for c in EXP2_COEFFICIENTS)
    p = fma(fma(fma(fma(fma(c5, z, c4), z, c3), z, c2), z, c1), z, torch.ones_like(z))
    return torch.ldexp(p, n.to(torch.int32))


# --- the Bernoulli diffusion step ------------------------------------------------------------------------------------
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flip_logits(logits: Tensor, x_t: Tensor, x0_prediction: bool) -> Tensor:
    """Logits of x_0 != x_t: an x_0 prediction changes sign where the bit of x_t is 1."""
    if not x0_prediction:
        return logits
    return torch.where(unpack_bits(x_t, logits.shape[-1], torch.bool), -logits, logits)


def _ratio(logits: Tensor, coefficients: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """N and D of P(x_s != x_t) = (n0 + n1 f) / (d0 + d1 f), both multiplied by 1 + e, e = exp(-l / temperature)."""
    e = exp_neg(logits, temperature)
    n0, n1, d0, d1 = (c.view(-1, 1, 1).to(e.dtype).expand_as(e) for c in coefficients.unbind(-1))
    return fma(n0, e, n0 + n1), fma(d0, e, d0 + d1)


def guided(logits: Tensor, uncond: Tensor | None, guidance_scale: Tensor) -> Tensor:
    """l = l_u + s (l_c - l_u) on raw logits (Ho & Salimans 2022); s = 1 is plain conditional."""
    if uncond is None:
        return logits
    return fma(guidance_scale.to(logits.dtype).expand_as(logits), logits - uncond, uncond)


def flip_step(
    logits: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_offset: int | Tensor,
    temperature: float,
    x0_prediction: bool,
    uncond_logits: Tensor | None,
    guidance_scale: Tensor,
    keep_mask: Tensor | None,
    keep_bits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One reverse step x_t -> x_s: (packed (B, R, P), number of non-finite logits)."""
    dtype = working_dtype(logits.dtype)
    uncond = None if uncond_logits is None else uncond_logits.to(dtype)
    mixed = guided(logits.to(dtype), uncond, guidance_scale)
    numerator, denominator = _ratio(_flip_logits(mixed, x_t, x0_prediction), coefficients, temperature)
    mask = bernoulli_bits(numerator, denominator, logits.shape[-1], PURPOSE_FLIP_STEP, seed, step, sample_offset)
    x_s = x_t ^ pack_bits(mask)
    if keep_mask is not None and keep_bits is not None:
        x_s = (x_s & ~keep_mask) | (keep_bits & keep_mask)
    return x_s, (~torch.isfinite(mixed)).sum()


def flip_probability(logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool) -> Tensor:
    """P(x_s != x_t), (B, R, C)."""
    flip_logits = _flip_logits(logits.to(working_dtype(logits.dtype)), x_t, x0_prediction)
    numerator, denominator = _ratio(flip_logits, coefficients, temperature)
    return numerator / denominator


def flip_probability_backward(
    grad: Tensor, logits: Tensor, x_t: Tensor, coefficients: Tensor, temperature: float, x0_prediction: bool
) -> Tensor:
    """dP/dl = (n1 d0 - n0 d1) / (d0 + d1 f)^2 * f (1 - f) / temperature, with the sign of the x_0 conversion."""
    dtype = working_dtype(logits.dtype)
    scaled = _flip_logits(logits.to(dtype), x_t, x0_prediction) / temperature
    f, not_f = torch.sigmoid(scaled), torch.sigmoid(-scaled)  # 1 - f would lose a saturated logit's gradient
    n0, n1, d0, d1 = (c.view(-1, 1, 1).to(dtype) for c in coefficients.unbind(-1))
    slope = (n1 * d0 - n0 * d1) / (d0 + d1 * f).square() * f * not_f / temperature
    return _flip_logits(grad.to(dtype) * slope, x_t, x0_prediction)


def random_bits(num_samples: int, rows: int, num_bits: int, seed: Tensor, sample_offset: int) -> Tensor:
    """(B, R, P) packed fair coin flips."""
    half = torch.full((num_samples, rows, num_bits), 0.5, device=seed.device)
    zero = torch.zeros_like(seed)
    return pack_bits(bernoulli_bits(half, torch.ones_like(half), num_bits, PURPOSE_RANDOM_BITS, seed, zero, sample_offset))


def add_noise(x_0: Tensor, flip_probability: Tensor, num_bits: int, seed: Tensor, step: Tensor, sample_offset: int) -> Tensor:
    """Forward process: every bit of x_0 flipped with its sample's probability (k_t = 1 - 2 flip_probability)."""
    p = flip_probability.to(torch.float32).view(-1, 1, 1).expand(*x_0.shape[:-1], num_bits)
    return x_0 ^ pack_bits(bernoulli_bits(p, torch.ones_like(p), num_bits, PURPOSE_ADD_NOISE, seed, step, sample_offset))


def binarize(logits: Tensor, bernoulli: bool, seed: Tensor, step: Tensor, sample_offset: int) -> Tensor:
    """(B, R, C) bool: Bernoulli(sigmoid(l)), or l > 0."""
    if not bernoulli:
        return logits > 0
    e = exp_neg(logits.to(working_dtype(logits.dtype)), 1.0)
    return bernoulli_bits(torch.ones_like(e), 1 + e, logits.shape[-1], PURPOSE_BINARIZE, seed, step, sample_offset)


# --- the loss --------------------------------------------------------------------------------------------------------
def _margin(logits: Tensor, x_0: Tensor, x_t: Tensor, x0_prediction: bool) -> tuple[Tensor, Tensor]:
    """(sign (2 y - 1), weight-side flips y): the target y is x_0 XOR x_t, or x_0 itself for an x_0 prediction."""
    target = unpack_bits(x_0 if x0_prediction else x_0 ^ x_t, logits.shape[-1], working_dtype(logits.dtype))
    return 2 * target - 1, target


def _class_weight(target: Tensor, set_fraction: Tensor | None) -> Tensor:
    """1 - r where the target is set and r where it is not, r the set fraction of the sample (the paper's own loss)."""
    if set_fraction is None:
        return torch.ones_like(target)
    r = set_fraction.to(target.dtype).view(-1, 1, 1)
    return torch.where(target > 0, 1 - r, r)


def flip_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    focal_gamma: float,
    balanced: bool,
    x0_prediction: bool,
    factor: float,
    total: bool,
) -> tuple[Tensor, Tensor | None]:
    """(B,) factor * weight of the sample * its sum of  class weight * q^gamma * softplus(-m),  m the margin, q = sigmoid(-m).

    With `total` the sum of these, a scalar. And, if balanced, (B,) the fraction of set targets.
    """
    sign, target = _margin(logits, x_0, x_t, x0_prediction)
    set_fraction = target.mean((1, 2)) if balanced else None
    m = sign * logits.to(sign.dtype)
    bits = torch.nn.functional.softplus(-m) * torch.sigmoid(-m) ** focal_gamma
    losses = factor * (bits * _class_weight(target, set_fraction)).sum((1, 2))
    if weight is not None:
        losses = losses * weight
    return losses.sum() if total else losses, set_fraction


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
) -> Tensor:
    """d flip_loss / d logits = -sign * factor * weight * class weight * q^gamma (q + gamma (1 - q) softplus(-m)), times grad."""
    sign, target = _margin(logits, x_0, x_t, x0_prediction)
    m = sign * logits.to(sign.dtype)
    q = torch.sigmoid(-m)
    slope = q**focal_gamma * (q + focal_gamma * torch.sigmoid(m) * torch.nn.functional.softplus(-m))
    scale = factor * grad.to(sign.dtype).view(-1, 1, 1)
    if weight is not None:
        scale = scale * weight.view(-1, 1, 1)
    return -sign * _class_weight(target, set_fraction) * slope * scale


# --- products with bits, distances -----------------------------------------------------------------------------------
def embed_bits(packed: Tensor, weight: Tensor, bias: Tensor | None, signed: bool) -> Tensor:
    """(M, P) uint8, (C, D) -> (M, D): (2 x - 1) @ weight + bias, or x @ weight + bias."""
    x = unpack_bits(packed, weight.shape[0], weight.dtype)
    out = (2 * x - 1 if signed else x) @ weight
    return out if bias is None else out + bias


def embed_bits_backward(grad: Tensor, packed: Tensor, num_bits: int, signed: bool) -> Tensor:
    """(C, D): gradient of embed_bits with respect to weight."""
    x = unpack_bits(packed, num_bits, grad.dtype)
    return (2 * x - 1 if signed else x).mT @ grad


def _popcount(x: Tensor) -> Tensor:
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B, n), (B or 1, n) uint8 -> (B,) int32: number of differing bits."""
    return _popcount(a ^ b).sum(-1, dtype=torch.int32)


def hamming_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, n), (M, n) -> the k nearest: distances (Q, k) int32 ascending, indices (Q, k) int64, ties by lower index."""
    if len(queries) == 0:
        empty = queries.new_empty(0, k)
        return empty.to(torch.int32), empty.to(torch.int64)
    rows = [torch.sort(hamming_distance(database, q[None]), stable=True) for q in queries]
    return torch.stack([r.values[:k] for r in rows]), torch.stack([r.indices[:k] for r in rows])
