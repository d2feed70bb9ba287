"""A folder of many samples, made by one process or several, resumable: every piece is whole or absent."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bldm_kernels import checks

from .checkpoint import write_atomically
from .grid import save_png, to_uint8
from .latents import PackedLatents

SETTINGS = "sampling.json"


@dataclass(frozen=True)
class Share:
    """Which pieces are this process's: those whose number is `rank` modulo `processes`."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0

    @classmethod
    def of_launcher(cls) -> "Share":
        """What torchrun or `accelerate launch` say; without them, everything. The processes need not talk to each other."""
        rank, processes, local_rank = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return cls(rank, processes, local_rank)


def fingerprint(tensors: Mapping[str, Tensor | None]) -> str:
    """SHA-256 of named tensors: whether a folder was begun with the same weights and conditions."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if value is not None:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SampleFolder:
    """Numbered samples in a folder: images 000000.png, 000001.png, ..., or packed latents latents-000000.safetensors, ...

    A piece is a batch: samples i * piece to (i + 1) * piece. Which bits a sample gets depends on the seed and its number alone,
    and batches are the same however many processes share the work, so the folder is the same too, where the model's logits
    are. A process that is started again skips the pieces that are there.

    Args:
        path: the folder; it holds the settings too (sampling.json).
        num_samples: of all processes together.
        piece: samples of a piece.
        settings: what the samples depend on (JSON values); a folder begun with others is an error.
        packed: `PackedLatents` files, one a piece, instead of images.
        share: which pieces this process makes.

    Raises: ValueError for a folder begun with other settings, naming the first that differs.
    """

    def __init__(
        self,
        path: str | Path,
        num_samples: int,
        piece: int,
        settings: Mapping[str, Any],
        *,
        packed: bool = False,
        share: Share | None = None,
    ):
        self.path, self.packed, self.share = Path(path), packed, share or Share()
        self.num_samples = checks.integer("num_samples", num_samples, 1, 2**62)
        self.piece = checks.integer("piece", piece, 1, 2**31 - 1)
        self._digits = max(6, len(str(num_samples - 1)))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, {self.path} is a file")
        known = {**settings, "num_samples": num_samples, "piece": piece, "packed": packed}
        self._agree(json.loads(json.dumps(known)))

    def _agree(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.exists():  # several processes may write it at once: the same bytes, each time whole
            text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
            write_atomically(file, lambda name: Path(name).write_text(text))
        try:
            found = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"out: {file} is not valid JSON: {error}") from None
        for name in sorted({*settings, *found}):
            if found.get(name) != settings.get(name):
                raise ValueError(f"{name}: {self.path} was begun with {found.get(name)!r}, got {settings.get(name)!r}")

    def missing(self) -> list[tuple[int, int]]:
        """(first sample, number of samples) of every piece of this process's share that is not there yet."""
        there = set(os.listdir(self.path))
        pieces = range(self.share.rank * self.piece, self.num_samples, self.share.processes * self.piece)
        sizes = [(first, min(self.piece, self.num_samples - first)) for first in pieces]
        return [(first, count) for first, count in sizes if not there.issuperset(self._names(first, count))]

    def _names(self, first: int, count: int) -> list[str]:
        if self.packed:
            return [f"latents-{first:0{self._digits}}.safetensors"]
        return [f"{i:0{self._digits}}.png" for i in range(first, first + count)]

    def write(self, first: int, latents: PackedLatents, decode: Callable[[Tensor], Tensor]) -> None:
        """Write a piece: its packed latents, or the images (B, 1 or 3, H, W) in [-1, 1] that `decode` makes of them."""
        names = self._names(first, len(latents))
        if self.packed:
            latents.save(self.path / names[0])
            return
        images = to_uint8(decode(latents.packed)).permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(4) as threads:  # compressing lets others run
            list(threads.map(self._save, images, names))

    def _save(self, pixels: Any, name: str) -> None:
        save_png(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), self.path / name)


def load_latents(path: str | Path) -> PackedLatents:
    """All latents of a folder of packed pieces, in order. Raises ValueError where some are missing."""
    path = Path(path)
    settings = json.loads((path / SETTINGS).read_text())
    folder = SampleFolder(path, settings["num_samples"], settings["piece"], settings, packed=settings["packed"])
    if not folder.packed or folder.missing():
        lacking = f"{len(folder.missing())} of its pieces are missing" if folder.packed else "it holds images"
        raise ValueError(f"path: {path} is no whole folder of latents: {lacking}")
    parts = [PackedLatents.load(file) for file in sorted(path.glob("latents-*.safetensors"))]
    return PackedLatents(torch.cat([part.packed for part in parts]), parts[0].shape)
