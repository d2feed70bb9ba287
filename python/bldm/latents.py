"""PackedLatents: a batch of binary latents as bytes, with its shape in bits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import bldm_kernels as bk

from .checkpoint import write_atomically


def check_padding(name: str, packed: Tensor, num_bits: int) -> None:
    """The bits beyond `num_bits` in the last byte of every position must be 0."""
    padding = -num_bits % 8
    if padding and packed.numel() and bool((packed[..., -1] >> (8 - padding)).any()):
        raise ValueError(f"{name}: the last {padding} bits of every position are padding and must be 0")


class PackedLatents:
    """B binary latents of `shape` bits each (channels last), held as uint8 (B, *shape[:-1], ceil(C / 8)).

    Args:
        packed: uint8 tensor, padding bits 0.
        shape: bits of one latent, for example (16, 16, 64) or (256, 64).

    Raises: TypeError, ValueError when `packed` is not the packed form of latents of `shape`.
    """

    def __init__(self, packed: Tensor, shape: Sequence[int]):
        self.shape = tuple(bk.checks.integer("shape", size, 0, 2**31 - 1) for size in shape)
        if not self.shape:
            raise ValueError("shape: expected at least the number of channels, got ()")
        bk.checks.packed("packed", packed)
        expected = (*self.shape[:-1], (self.shape[-1] + 7) // 8)
        if tuple(packed.shape[1:]) != expected:
            raise ValueError(
                f"packed: expected shape (B, {', '.join(map(str, expected))}) for latents of {self.shape} bits, "
                f"got {tuple(packed.shape)}"
            )
        check_padding("packed", packed, self.shape[-1])
        self.packed = packed

    @classmethod
    def from_bits(cls, bits: Tensor, dim: int = -1) -> "PackedLatents":
        """From bits of any dtype with the channels at `dim`: (B, ..., C), or (B, C, H, W) with dim=1."""
        bk.checks.tensor("bits", bits, min_dim=2)
        if bk.checks.dimension("dim", dim, bits.dim()) == 0:
            raise ValueError("dim: expected a channel dimension, got 0 (the sample)")
        packed = bk.pack_bits(bits, dim)
        return cls(packed, (*packed.shape[1:-1], bits.shape[dim]))

    def to_bits(self, dtype: torch.dtype = torch.float32, dim: int = -1) -> Tensor:
        """Unpacked bits, channels last, or at `dim` (1 gives (B, C, H, W))."""
        return bk.unpack_bits(self.packed, self.shape[-1], dtype, dim=dim)

    def to(self, device: torch.device | str) -> "PackedLatents":
        return PackedLatents(self.packed.to(device), self.shape)

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "PackedLatents":
        """Some of the latents; an int gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):  # also what ends a loop over the latents
                raise IndexError(f"index: expected within {-len(self)}..{len(self) - 1}, got {index}")
            index = slice(index % len(self), index % len(self) + 1)
        return PackedLatents(self.packed[index], self.shape)

    def __eq__(self, other: object) -> bool:
        """Whether all latents are the same (a bool, as for lists)."""
        return isinstance(other, PackedLatents) and self.shape == other.shape and torch.equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]

    def __xor__(self, other: "PackedLatents") -> "PackedLatents":
        """The bits in which the two differ."""
        if not isinstance(other, PackedLatents):
            return NotImplemented
        self._check_like("other", other)
        return PackedLatents(self.packed ^ other.packed, self.shape)

    def hamming(self, other: "PackedLatents") -> Tensor:
        """int32 (B,): number of differing bits of each pair; `other` may hold a single latent."""
        self._check_like("other", other)
        return bk.hamming_distance(self.packed, other.packed)

    def _check_like(self, name: str, other: "PackedLatents") -> None:
        if not isinstance(other, PackedLatents):
            raise TypeError(f"{name}: expected PackedLatents, got {type(other).__name__}")
        if other.shape != self.shape or len(other) not in (1, len(self)):
            raise ValueError(f"{name}: expected {len(self)} latents, or one, of {self.shape} bits, got {other!r}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"packed": self.packed.contiguous().cpu()}
        metadata = {"format": "bldm.PackedLatents", "shape": ",".join(map(str, self.shape))}
        write_atomically(Path(path), lambda name: save_file(tensors, name, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> "PackedLatents":
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "bldm.PackedLatents" or "shape" not in metadata:
                    raise ValueError("a safetensors file, but not of packed latents")
                return cls(file.get_tensor("packed"), [int(size) for size in metadata["shape"].split(",")])
        except SafetensorError as error:
            raise ValueError(f"path: {path} is truncated or not a safetensors file of packed latents: {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: {path} does not hold packed latents: {error}") from None

    def __repr__(self) -> str:
        return f"PackedLatents({len(self)} x {self.shape} bits, {self.packed.device})"
