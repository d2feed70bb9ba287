"""PackedLatents: packed bits that know their shape, in memory and in a file."""

from pathlib import Path

import pytest
import torch
from bldm import PackedLatents
from safetensors.torch import save_file

import bldm_kernels as bk


def latents(count: int = 5, shape: tuple[int, ...] = (3, 2, 13), seed: int = 0) -> PackedLatents:
    return PackedLatents(bk.random_bits(count, shape, seed=seed), shape)


@pytest.mark.parametrize("shape", [(13,), (4, 8), (3, 2, 13), (2, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_bits_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = latents(4, shape)
    bits = packed.to_bits(dtype)
    assert bits.shape == (4, *shape) and bits.dtype == dtype
    assert PackedLatents.from_bits(bits) == packed
    assert repr(packed) == f"PackedLatents(4 x {shape} bits, cpu)"


def test_channels_first() -> None:
    packed = latents()
    bits = packed.to_bits(dim=1)
    assert bits.shape == (5, 13, 3, 2)
    assert torch.equal(bits.movedim(1, -1), packed.to_bits())
    assert PackedLatents.from_bits(bits, dim=1) == packed
    assert PackedLatents.from_bits(bits, dim=-3) == packed


def test_length_and_parts() -> None:
    packed = latents()
    bits = packed.to_bits()
    assert len(packed) == 5
    for index in (0, 4, -1, -5):
        assert len(packed[index]) == 1 and torch.equal(packed[index].to_bits()[0], bits[index])
    assert torch.equal(packed[1:4].to_bits(), bits[1:4])
    chosen = torch.tensor([3, 0])
    assert torch.equal(packed[chosen].to_bits(), bits[chosen])
    assert torch.equal(torch.cat([one.packed for one in packed]), packed.packed)
    for index in (5, -6):
        with pytest.raises(IndexError, match=r"index: expected within -5..4"):
            packed[index]


def test_equality() -> None:
    packed = latents()
    assert packed == latents()
    assert packed.to("cpu") == packed
    assert packed != latents(seed=1)
    assert packed != packed[:4]
    assert packed != packed.packed
    eight, five = torch.zeros(2, 4, 1, dtype=torch.uint8), torch.zeros(2, 4, 1, dtype=torch.uint8)
    assert PackedLatents(eight, (4, 8)) != PackedLatents(five, (4, 5)), "the same bytes, but other bits"
    with pytest.raises(TypeError, match="unhashable"):
        hash(packed)


def test_xor_and_hamming() -> None:
    a, b = latents(), latents(seed=1)
    different = (a.to_bits(torch.bool) ^ b.to_bits(torch.bool)).flatten(1)
    assert torch.equal((a ^ b).to_bits(torch.bool).flatten(1), different)
    assert (a ^ b) ^ b == a
    assert torch.equal(a.hamming(b), different.sum(1, dtype=torch.int32))
    to_first = (a.to_bits(torch.bool) ^ a.to_bits(torch.bool)[:1]).flatten(1)
    assert torch.equal(a.hamming(a[0]), to_first.sum(1, dtype=torch.int32))
    assert torch.equal((a ^ a[0]).to_bits(torch.bool).flatten(1), to_first)


@pytest.mark.parametrize("count", [0, 5])
def test_save_and_load(tmp_path: Path, count: int) -> None:
    packed = latents(count)
    packed.save(tmp_path / "new" / "latents.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["latents.safetensors"]
    loaded = PackedLatents.load(str(tmp_path / "new" / "latents.safetensors"))
    assert loaded == packed and loaded.shape == packed.shape and loaded.packed.dtype == torch.uint8


def test_parts_and_other_strides_are_saved_too(tmp_path: Path) -> None:
    packed = latents()
    part = PackedLatents(packed.packed.permute(0, 2, 1, 3), (2, 3, 13))[1::2]
    part.save(tmp_path / "part")
    assert PackedLatents.load(tmp_path / "part") == part


def test_saving_replaces_the_file(tmp_path: Path) -> None:
    latents(seed=0).save(tmp_path / "file")
    latents(seed=1).save(tmp_path / "file")
    assert PackedLatents.load(tmp_path / "file") == latents(seed=1)


def damaged(path: Path, kind: str) -> None:
    latents().save(path)
    whole = path.read_bytes()
    metadata = {"format": "bldm.PackedLatents", "shape": "3,2,13"}
    packed = latents().packed
    if kind == "truncated":
        path.write_bytes(whole[:-7])
    elif kind == "header only":
        path.write_bytes(whole[:20])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("a text file, and not a short one: " * 40)
    elif kind == "pickle":
        torch.save({"packed": packed}, path)
    elif kind == "other safetensors":
        save_file({"packed": packed}, path)
    elif kind == "no tensor":
        save_file({"bits": packed}, path, metadata=metadata)
    elif kind == "no shape":
        save_file({"packed": packed}, path, metadata={"format": "bldm.PackedLatents"})
    elif kind == "bad shape":
        save_file({"packed": packed}, path, metadata=metadata | {"shape": "3,two,13"})
    elif kind == "wrong shape":
        save_file({"packed": packed}, path, metadata=metadata | {"shape": "3,2,17"})
    elif kind == "wrong dtype":
        save_file({"packed": packed.int()}, path, metadata=metadata)
    elif kind == "padding":
        save_file({"packed": packed | 255}, path, metadata=metadata)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("truncated", "is truncated or not a safetensors file"),
        ("header only", "is truncated or not a safetensors file"),
        ("empty", "is truncated or not a safetensors file"),
        ("text", "is truncated or not a safetensors file"),
        ("pickle", "is truncated or not a safetensors file"),
        ("other safetensors", "a safetensors file, but not of packed latents"),
        ("no tensor", "of packed latents.*packed"),
        ("no shape", "a safetensors file, but not of packed latents"),
        ("bad shape", "'two'"),
        ("wrong shape", "expected shape"),
        ("wrong dtype", "expected dtype uint8, got int32"),
        ("padding", "padding and must be 0"),
    ],
)
def test_damaged_files(tmp_path: Path, kind: str, expected: str) -> None:
    path = tmp_path / "damaged.file"
    damaged(path, kind)
    with pytest.raises(ValueError, match=f"(?s)^path: .*damaged.file.*({expected})"):
        PackedLatents.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PackedLatents.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match="path|directory|device"):
        PackedLatents.load(tmp_path)
