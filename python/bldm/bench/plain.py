"""The opponents: the same operations in plain PyTorch, as Bernoulli-diffusion code is usually written, on float32 bits."""

import torch
from torch import Tensor
from torch.nn import functional as F


# --- packed bits -----------------------------------------------------------------------------------------------------
def pack(bits: Tensor) -> Tensor:
    """(..., C) of 0 and 1 -> (..., C / 8) uint8: shifts and a sum."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2).to(dtype)


def random_bits(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.bernoulli(torch.full(shape, 0.5, device=device))


def binarize(logits: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(logits.float()))


# --- the Bernoulli diffusion -----------------------------------------------------------------------------------------
def one_probability(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float, temperature: float = 1.0) -> Tensor:
    """P(x_s = 1) of the `plugin` reverse step for flip prediction (Wang et al. 2023, eq. 9)."""
    flip = torch.sigmoid(logits.float() / temperature)
    x_0 = x_t * (1 - flip) + (1 - x_t) * flip
    prior = torch.stack([x_0, 1 - x_0], -1) * kept_s + (1 - kept_s) / 2
    likelihood = torch.stack([x_t, 1 - x_t], -1) * kappa + (1 - kappa) / 2
    joint = prior * likelihood
    return (joint / joint.sum(-1, keepdim=True))[..., 0]


def step(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float, temperature: float = 1.0) -> Tensor:
    """The reverse step itself: float bits in, float bits out."""
    return torch.bernoulli(one_probability(logits, x_t, kept_s, kappa, temperature))


def flip_probability(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float) -> Tensor:
    """P(x_s != x_t) of the same step."""
    return (one_probability(logits, x_t, kept_s, kappa) - x_t).abs()


def step_probability(logits: Tensor, x_t: Tensor, kept_s: float, kappa: float) -> Tensor:
    """P(x_s != x_t) of the same step in float64, to check what is timed."""
    flip = torch.sigmoid(logits.double())
    moved = (1 - kappa) * ((1 - kept_s) / 2 + kept_s * flip)
    stayed = (1 + kappa) * (1 - (1 - kept_s) / 2 - kept_s * flip)
    return moved / (moved + stayed)


def add_noise(x_0: Tensor, kept: float) -> Tensor:
    return torch.bernoulli(x_0 * kept + (1 - kept) / 2)


# --- the loss --------------------------------------------------------------------------------------------------------
def flip_loss(logits: Tensor, x_0: Tensor, x_t: Tensor) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, (x_0 != x_t).to(logits.dtype))


def balanced_flip_loss(logits: Tensor, x_0: Tensor, x_t: Tensor) -> Tensor:
    """Set targets weighed by 1 - r, the others by r, r the set fraction of the sample."""
    logits = logits.float()
    target = (x_0 != x_t).to(logits.dtype)
    r = target.mean((1, 2), keepdim=True)
    weight = target * (1 - r) + (1 - target) * r
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight)


# --- products with bits, distances -----------------------------------------------------------------------------------
def embed(packed: Tensor, weight: Tensor) -> Tensor:
    return (2 * unpack(packed, weight.dtype) - 1) @ weight


def embed_unpacked(signs: Tensor, weight: Tensor) -> Tensor:
    """The product alone, for code that keeps its bits as -1 and 1 in the dtype of the weight."""
    return signs @ weight


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a != b).flatten(1).sum(1)


def hamming_nearest(query: Tensor, database: Tensor, k: int) -> Tensor:
    """Distances of the k nearest to one query, on unpacked uint8 bits."""
    return (database ^ query).sum(1).topk(k, largest=False).values


def hamming_nearest_matmul(queries: Tensor, database: Tensor, k: int) -> Tensor:
    """The same for many queries, by one matrix product of bits kept as -1 and 1: differing bits = (C - q . d) / 2."""
    if queries.is_cuda:
        product = torch.mm(queries, database.T, out_dtype=torch.float32)
    else:
        product = queries @ database.T
    return (queries.shape[1] - product.topk(k).values) / 2
