"""PackedLatents: a batch of binary latents as bytes, with its shape in bits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import bldm_kernels as bk

from .checkpoint import write_atomically


class PackedLatents:
    """B binary latents of `shape` bits each (channels last), held as uint8 (B, *shape[:-1], ceil(C / 8)).

    Args:
        packed: uint8 tensor, padding bits 0.
        shape: bits of one latent, for example (16, 16, 64) or (256, 64).

    Raises: TypeError, ValueError when `packed` is not the packed form of latents of `shape`.
    """

    def __init__(self, packed: Tensor, shape: Sequence[int]):
        self.shape = tuple(int(size) for size in shape)
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
            raise TypeError(f"packed: expected a uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
        expected = (*self.shape[:-1], (self.shape[-1] + 7) // 8) if self.shape else ()
        if not self.shape or tuple(packed.shape[1:]) != expected:
            raise ValueError(
                f"packed: expected shape (B, {', '.join(map(str, expected))}) for latents of {self.shape} bits, "
                f"got {tuple(packed.shape)}"
            )
        padding = -self.shape[-1] % 8
        if padding and packed.numel() and bool((packed[..., -1] >> (8 - padding)).any()):
            raise ValueError(f"packed: the last {padding} bits of every position are padding and must be 0")
        self.packed = packed

    @classmethod
    def from_bits(cls, bits: Tensor, dim: int = -1) -> "PackedLatents":
        """From bits of any dtype with the channels at `dim`: (B, ..., C), or (B, C, H, W) with dim=1."""
        return cls(
            bk.pack_bits(bits, dim), (*(s for i, s in enumerate(bits.shape) if i not in (0, dim % bits.dim())), bits.shape[dim])
        )

    def to_bits(self, dtype: torch.dtype = torch.float32, dim: int = -1) -> Tensor:
        """Unpacked bits, channels last, or at `dim` (1 gives (B, C, H, W))."""
        return bk.unpack_bits(self.packed, self.shape[-1], dtype, dim=dim)

    def to(self, device: torch.device | str) -> "PackedLatents":
        return PackedLatents(self.packed.to(device), self.shape)

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "PackedLatents":
        if isinstance(index, int):
            index = slice(index, None if index == -1 else index + 1)
        return PackedLatents(self.packed[index], self.shape)

    def __eq__(self, other: object) -> bool:
        """Whether all latents are the same (a bool, as for lists)."""
        return isinstance(other, PackedLatents) and self.shape == other.shape and torch.equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]

    def __xor__(self, other: "PackedLatents") -> "PackedLatents":
        """The bits in which the two differ."""
        if not isinstance(other, PackedLatents):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"other: expected latents of {self.shape} bits, got {other.shape}")
        return PackedLatents(self.packed ^ other.packed, self.shape)

    def hamming(self, other: "PackedLatents") -> Tensor:
        """int32 (B,): number of differing bits of each pair; `other` may hold a single latent."""
        if self.shape != other.shape:
            raise ValueError(f"other: expected latents of {self.shape} bits, got {other.shape}")
        return bk.hamming_distance(self.packed, other.packed)

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
                if metadata.get("format") != "bldm.PackedLatents":
                    raise ValueError(f"path: {path} is a safetensors file, but not of packed latents")
                return cls(file.get_tensor("packed"), [int(size) for size in metadata["shape"].split(",")])
        except SafetensorError as error:
            raise ValueError(f"path: {path} is truncated or not a safetensors file: {error}") from None

    def __repr__(self) -> str:
        return f"PackedLatents({len(self)} x {self.shape} bits, {self.packed.device})"
