"""What the files of a store look like: the columns, the bytes of a shard, and the index.

A shard is a safetensors file with one tensor a column, `packed` among them; its metadata make it a `PackedLatents` file too, so
that it can be read without the index. Its header follows from the index alone: a reader compares it whole. (The safetensors
library writes metadata in an order that differs from run to run; here the same samples must give the same bytes.)
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bldm_kernels import checks

from ..checkpoint import write_atomically

FORMAT, VERSION = "bldm.LatentStore", 1
INDEX, PACKED = "index.json", "packed"
PAGE = 4096  # data begin on one, and a multiple of it makes a shard: latents of 2 KiB then never lie on two pages
SHARD_BYTES = 2**26
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Column:
    """One tensor a sample: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of a shard."""

    file: str
    samples: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Layout:
    """Shape in bits of a latent, the other columns, and how many samples a shard holds (the last one may hold fewer)."""

    latent_shape: tuple[int, ...]
    columns: dict[str, Column]
    samples_per_shard: int

    @classmethod
    def check(
        cls,
        latent_shape: Sequence[int],
        columns: Mapping[str, tuple[Sequence[int], torch.dtype]],
        samples_per_shard: int | None,
    ) -> "Layout":
        """From a caller's arguments. By default a shard holds at most 64 MiB."""
        shape = tuple(checks.integer("latent_shape", size, 1, 2**31 - 1) for size in latent_shape)
        if not shape:
            raise ValueError("latent_shape: expected at least the number of channels, got ()")
        known = {}
        for name, (sizes, dtype) in columns.items():
            if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name == PACKED:
                raise ValueError(f"columns: expected names of letters, digits and _, other than {PACKED!r}, got {name!r}")
            if dtype not in CODES:
                raise TypeError(f"columns: expected a dtype among {', '.join(map(str, CODES))} for {name!r}, got {dtype}")
            known[name] = Column(tuple(checks.integer("columns", size, 1, 2**31 - 1) for size in sizes), dtype)
        layout = cls(shape, dict(sorted(known.items())), 1)
        sample = sum(column.nbytes for column in layout.fields.values())
        count = samples_per_shard
        if count is None:
            count = max(1, SHARD_BYTES // sample)
            count -= count % PAGE if count > PAGE else 0
        return cls(shape, layout.columns, checks.integer("samples_per_shard", count, 1, 2**40))

    @property
    def fields(self) -> dict[str, Column]:
        """All columns in the order of the file: wide items first, which keeps every tensor aligned, and `packed` last."""
        *positions, channels = self.latent_shape
        packed = Column((*positions, (channels + 7) // 8), torch.uint8)
        return {**dict(sorted(self.columns.items(), key=lambda item: -item[1].dtype.itemsize)), PACKED: packed}

    def header(self, samples: int) -> bytes:
        """The first bytes of a shard, up to its data: a safetensors header, padded so that the data are aligned."""
        shape = ",".join(map(str, self.latent_shape))
        entries: dict[str, Any] = {"__metadata__": {"format": "bldm.PackedLatents", "shape": shape}}
        end = 0
        for name, column in self.fields.items():
            start, end = end, end + samples * column.nbytes
            entries[name] = {"dtype": CODES[column.dtype], "shape": [samples, *column.shape], "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        size = -(-(8 + len(text)) // PAGE) * PAGE - 8
        return struct.pack("<Q", size) + text.ljust(size)

    def to_json(self) -> dict[str, Any]:
        columns = {name: {"shape": list(c.shape), "dtype": CODES[c.dtype]} for name, c in self.columns.items()}
        return {"latent_shape": list(self.latent_shape), "columns": columns, "samples_per_shard": self.samples_per_shard}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Layout":
        columns = {name: (c["shape"], DTYPES[c["dtype"]]) for name, c in body["columns"].items()}
        return cls.check(body["latent_shape"], columns, body["samples_per_shard"])


@dataclass
class Index:
    """The contents of index.json: the layout, the committed shards, and whether the store is complete."""

    layout: Layout
    metadata: dict[str, Any]
    shards: list[ShardEntry] = field(default_factory=list)
    complete: bool = False

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def _check(self) -> None:
        """Sample i is in shard i // samples_per_shard: the rest of the library counts on it."""
        full = self.layout.samples_per_shard
        for number, shard in enumerate(self.shards):
            last = self.complete and number == len(self.shards) - 1
            if shard.file != shard_name(number) or not (0 < shard.samples <= full if last else shard.samples == full):
                raise ValueError(f"shard {number} is {shard.file} with {shard.samples} samples, where {full} make a shard")

    def write(self, folder: Path) -> None:
        body = {
            "format": FORMAT,
            "version": VERSION,
            **self.layout.to_json(),
            "metadata": self.metadata,
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps({**body, "sha256": _checksum(body)}, indent=1) + "\n"
        write_atomically(folder / INDEX, lambda name: Path(name).write_text(text))

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises FileNotFoundError or ValueError, naming the file, for anything but a whole index of this version."""
        path = folder / INDEX
        hint = "; its shards can still be read one by one, with bldm.PackedLatents.load"
        if not path.is_file():
            left = any(folder.glob(shard_name("*")))
            raise FileNotFoundError(f"store: {folder} has no {INDEX}" + (hint if left else ""))
        try:
            body = json.loads(path.read_bytes())
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError(f"expected the format {FORMAT!r}")
            if body["version"] != VERSION:
                raise ValueError(f"it is of version {body['version']}, and this library reads version {VERSION}")
            if body.pop("sha256") != _checksum(body):
                raise ValueError("its contents do not match its checksum")
            shards = [ShardEntry(**shard) for shard in body["shards"]]
            index = cls(Layout.from_json(body), body["metadata"], shards, body["complete"])
            index._check()
            return index
        except KeyError as error:
            raise ValueError(f"store: {path} is damaged: it has no {error}{hint}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"store: {path} cannot be used: {error}{hint}") from None


def shard_name(number: int | str) -> str:
    return f"shard-{number:05}.safetensors" if isinstance(number, int) else f"shard-{number}.safetensors"


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
