"""BinaryQuantizer: a bottleneck of bits with the (quantized, indices, aux_loss) signature of other quantisers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk

MAX_INDEX_BITS = 63  # of an int64 that stays positive


class Quantized(NamedTuple):
    """`quantized` like the input, `indices` int64 one a position (or packed bytes), `aux_loss` a scalar."""

    quantized: Tensor
    indices: Tensor
    aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The parts of `aux_loss`, before their weights: scalars."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class BinaryQuantizer(nn.Module):
    """Every channel becomes one bit: lookup-free quantisation (LFQ, Yu et al. 2024, arXiv 2310.05737), binary spherical
    quantisation (BSQ, Zhao et al. 2024, arXiv 2406.07548), or Bernoulli bits (Wang et al. 2023, eq. 3).

    The 2^C codes are never enumerated: a code is C bits, packed into bytes, and an index is those bytes shifted together.

    Args:
        num_bits: C. Up to 63, indices are int64; beyond, packed bytes uint8 (..., ceil(C / 8)) as `bldm_kernels.pack_bits` makes.
        dim: channels of the input, if not C: linear projections in and out.
        mode: "threshold" (bit = x > 0, the gradient passes straight through) or "bernoulli" (x are logits; in training, or with a
            seed, bits are drawn from sigmoid(x) and the gradient is that of the sigmoid; otherwise bit = x > 0).
        spherical: BSQ: inputs are normalised (in mode "threshold") and codes have length `codebook_scale`: +-1 / sqrt(C).
        codebook_scale: size of a code's values: +-codebook_scale.
        bit_order: "big": channel 0 is the most significant bit of an index (LFQ, BSQ); "little": the least (BinaryMapper).
        entropy_loss_weight, diversity_gamma: weight of per_sample_entropy - diversity_gamma * batch_entropy.
        entropy_group_bits: bits, 1..16, whose joint distribution the batch entropy looks at: the entropy of the average code is
            bounded by the sum over groups, exact for one group of all C. Costs 2^entropy_group_bits numbers a group and position.
        commitment_loss_weight: weight of the mean squared distance from input to code.
        channel_first: whether channels are dimension 1 or the last (default: dimension 1 from four dimensions on).

    Raises: TypeError, ValueError naming the argument.
    """

    _left: Tensor
    _right: Tensor
    _reverse: Tensor

    def __init__(
        self,
        num_bits: int,
        *,
        dim: int | None = None,
        mode: str = "threshold",
        spherical: bool = False,
        codebook_scale: float = 1.0,
        bit_order: str = "big",
        entropy_loss_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        entropy_group_bits: int = 1,
        commitment_loss_weight: float = 0.0,
        channel_first: bool | None = None,
    ):
        super().__init__()
        self.num_bits = bk.checks.integer("num_bits", num_bits, 1, 2**16)
        self.dim = num_bits if dim is None else bk.checks.integer("dim", dim, 1, 2**31 - 1)
        self.mode = bk.checks.option("mode", mode, ("threshold", "bernoulli"))
        self.bit_order = bk.checks.option("bit_order", bit_order, ("big", "little"))
        self.spherical, self.channel_first = spherical, channel_first
        self.codebook_scale = bk.checks.positive("codebook_scale", codebook_scale)
        self.entropy_loss_weight = bk.checks.real("entropy_loss_weight", entropy_loss_weight)
        self.diversity_gamma = bk.checks.real("diversity_gamma", diversity_gamma)
        self.entropy_group_bits = bk.checks.integer("entropy_group_bits", entropy_group_bits, 1, 16)
        self.commitment_loss_weight = bk.checks.real("commitment_loss_weight", commitment_loss_weight)
        self.project_in = nn.Identity() if self.dim == num_bits else nn.Linear(self.dim, num_bits)
        self.project_out = nn.Identity() if self.dim == num_bits else nn.Linear(num_bits, self.dim)

        # Byte i of a code holds the index bits from `left` on; with "big" its bits come in reverse, and the last byte's lowest
        # `right` ones are padding.
        bytes_before = torch.arange((num_bits + 7) // 8) * 8
        start = bytes_before if bit_order == "little" else num_bits - 8 - bytes_before
        self.register_buffer("_left", start.clamp(min=0), persistent=False)
        self.register_buffer("_right", (-start).clamp(min=0), persistent=False)
        reverse = torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=torch.uint8)
        self.register_buffer("_reverse", reverse, persistent=False)

    @property
    def code_value(self) -> float:
        """The size of a code's values: codes are this or minus this."""
        return self.codebook_scale * (self.num_bits**-0.5 if self.spherical else 1.0)

    @property
    def _has_integer_indices(self) -> bool:
        return self.num_bits <= MAX_INDEX_BITS

    def forward(
        self,
        x: Tensor,
        inv_temperature: float | None = None,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
    ) -> Quantized | tuple[Quantized, LossBreakdown]:
        """Quantise.

        Args:
            x: floating (B, ..., dim) or (B, dim, ...).
            inv_temperature: of the softmax over codes that the entropies are of (default 100); mode "threshold" only.
            return_loss_breakdown: also return the `LossBreakdown`.
            mask: bool, one a position: those that count in the losses.
            seed: for mode "bernoulli": an int, or a one-element int64 tensor on the device of x. In training, the default is to
                draw one from PyTorch's generator of that device.

        Returns: `Quantized`; the loss is 0 outside training.
        """
        bk.checks.floating("x", x, min_dim=2)
        dim = self._channel_dim(x.dim())
        if x.shape[dim] != self.dim:
            raise ValueError(f"x: expected {self.dim} channels at dimension {dim}, got shape {tuple(x.shape)}")
        bernoulli = self.mode == "bernoulli"
        if seed is not None and not bernoulli:
            raise ValueError("seed: mode 'threshold' draws nothing, expected None")
        if inv_temperature is not None and bernoulli:
            raise ValueError("inv_temperature: mode 'bernoulli' has its own probabilities, expected None")
        if bernoulli and seed is None and self.training:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)

        projected = _project(self.project_in, x, dim)
        z = projected if projected.dtype == torch.float64 else projected.float()
        if self.spherical and not bernoulli:
            z = F.normalize(z, dim=dim) * self.codebook_scale
        packed = bk.binarize(z.detach(), seed=seed, dim=dim)
        codes = self._codes(packed, z.dtype, dim)
        if self.training:
            soft = self.code_value * torch.tanh(z / 2) if bernoulli else z  # tanh(z / 2) = 2 sigmoid(z) - 1
            quantized = codes + (soft - soft.detach())
            logits = z if bernoulli else 4 * (100.0 if inv_temperature is None else inv_temperature) * self.code_value * z
            losses = self._losses(z.movedim(dim, -1), logits.movedim(dim, -1), codes.movedim(dim, -1), mask)
        else:
            quantized = codes
            losses = LossBreakdown(*z.new_zeros(3))
        entropy_loss = losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy
        result = Quantized(
            _project(self.project_out, quantized.to(projected.dtype), dim),
            self.packed_to_indices(packed),
            self.entropy_loss_weight * entropy_loss + self.commitment_loss_weight * losses.commitment,
        )
        return (result, losses) if return_loss_breakdown else result

    def _channel_dim(self, num_dims: int) -> int:
        first = num_dims >= 4 if self.channel_first is None else self.channel_first
        return 1 if first else num_dims - 1

    def _codes(self, packed: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
        bits = bk.unpack_bits(packed, self.num_bits, dtype, dim=dim)
        return bits.mul_(2 * self.code_value).sub_(self.code_value)

    def _losses(self, z: Tensor, logits: Tensor, codes: Tensor, mask: Tensor | None) -> LossBreakdown:
        """Channels last. p(code | x) is a product over the bits, with sigmoid(logits) the probability of each being 1."""
        if mask is not None:
            bk.checks.tensor("mask", mask, (torch.bool,))
            bk.checks.shape("mask", mask, z.shape[:-1], "one a position")
            z, logits, codes = z[mask], logits[mask], codes[mask]
        logits = logits.reshape(-1, self.num_bits)
        size = logits.abs()
        per_bit = F.softplus(-size) + size * torch.sigmoid(-size)  # entropy of a coin with these log odds
        ones = torch.sigmoid(logits)
        group = min(self.entropy_group_bits, self.num_bits)
        ones = F.pad(ones, (0, -self.num_bits % group), value=1.0).unflatten(-1, (-1, group))  # certain bits add nothing
        joint = torch.ones_like(ones[..., :1])
        for p in ones.split(1, dim=-1):
            joint = torch.cat([joint * (1 - p), joint * p], dim=-1)
        average = joint.mean(0)
        batch = -(average * average.clamp(min=torch.finfo(average.dtype).tiny).log()).sum()
        return LossBreakdown(per_bit.sum(-1).mean(), batch, F.mse_loss(z, codes))

    def packed_to_indices(self, packed: Tensor) -> Tensor:
        """Packed bits uint8 (..., ceil(C / 8)) -> int64 indices (...); beyond 63 bits the packed bits themselves."""
        bk.checks.packed("packed", packed, min_dim=1)
        bk.checks.shape("packed", packed, (*packed.shape[:-1], len(self._left)), f"{self.num_bits} bits")
        if not self._has_integer_indices:
            return packed
        values = packed.long() if self.bit_order == "little" else self._reverse[packed.long()].long()
        return ((values >> self._right) << self._left).sum(-1)

    def indices_to_packed(self, indices: Tensor) -> Tensor:
        """The inverse of `packed_to_indices`. On a CPU, an index out of range raises ValueError."""
        if not self._has_integer_indices:
            return self.packed_to_indices(indices)
        bk.checks.tensor("indices", indices, (torch.int64, torch.int32))
        if indices.device.type == "cpu" and bool(((indices < 0) | (indices.long() >> self.num_bits > 0)).any()):
            raise ValueError(f"indices: expected within 0..2^{self.num_bits} - 1, got some outside")
        values = (((indices.long()[..., None] >> self._left) << self._right) & 255).to(torch.uint8)
        return values if self.bit_order == "little" else self._reverse[values.long()]

    def indices_to_codes(self, indices: Tensor, project_out: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        """Indices -> `quantized` as `forward` returned it outside training; without `project_out`, the codes themselves."""
        packed = self.indices_to_packed(indices)
        codes = self._codes(packed, dtype, dim := self._channel_dim(packed.dim()))
        return _project(self.project_out, codes, dim) if project_out else codes

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes (values of either sign, C channels where `forward` has them) -> indices."""
        bk.checks.floating("codes", codes, min_dim=1)
        dim = self._channel_dim(codes.dim())
        return self.packed_to_indices(bk.pack_bits(codes > 0, dim))

    def extra_repr(self) -> str:
        shape = f"num_bits={self.num_bits}" + (f", dim={self.dim}" if self.dim != self.num_bits else "")
        return f"{shape}, mode={self.mode!r}, code_value={self.code_value:.4g}, bit_order={self.bit_order!r}"


def _project(layer: nn.Module, x: Tensor, dim: int) -> Tensor:
    return x if isinstance(layer, nn.Identity) else layer(x.movedim(dim, -1)).movedim(-1, dim)
