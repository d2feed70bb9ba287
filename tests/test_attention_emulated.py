"""The attention of 256 to 272 tokens on the emulated machine of tests/emulator, against float64, without a GPU."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler and an x86-64 processor")
    library = tmp_path_factory.mktemp("emulator") / "attention.so"
    flags = ["-std=c++20", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{ROOT}/tests/emulator", f"-I{ROOT}/csrc"]
    sources = [ROOT / "tests/emulator" / name for name in ("attention.cpp", "switch.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", library], check=True, timeout=300)
    loaded = ctypes.CDLL(str(library))
    loaded.attention.restype = ctypes.c_char_p
    return loaded


def run(library: ctypes.CDLL, qkv: Tensor, heads: int, scale: Tensor | None, blocks: int, parts: int, seed: int) -> Tensor:
    batch, tokens, width = qkv.shape
    out = torch.full((batch, tokens, width // 3), float("nan"), dtype=torch.bfloat16)
    if scale is not None:
        out = torch.full(out.shape, 0x7F, dtype=torch.uint8).view(E4M3)  # NaN
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (qkv, out)]
    factor = ctypes.c_void_p(None if scale is None else scale.data_ptr())
    sizes = [ctypes.c_int(n) for n in (batch, tokens, heads, parts)]
    error = library.attention(ctypes.c_int(blocks), ctypes.c_uint(seed), *pointers, factor, *sizes)
    assert error == b"", error.decode()
    return out


@pytest.mark.parametrize(
    "batch, tokens, heads, low, blocks, parts",
    [
        (1, 257, 1, False, 1, 1),
        (2, 258, 2, True, 3, 1),
        (1, 256, 2, False, 4, 2),
        (1, 272, 3, True, 2, 2),
        (2, 265, 1, False, 1, 1),
    ],
)
def test_attention_against_float64(
    emulated: ctypes.CDLL, batch: int, tokens: int, heads: int, low: bool, blocks: int, parts: int
) -> None:
    torch.manual_seed(0)
    qkv = (1.5 * torch.randn(batch, tokens, 3 * heads * 64)).bfloat16()
    scale = torch.tensor([0.01]) if low else None
    out = run(emulated, qkv, heads, scale, blocks, parts, seed=tokens)
    q, k, v = (x.double().unflatten(-1, (heads, 64)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = out.double() * (1 if scale is None else scale.double())
    for part in (slice(0, 256), slice(256, tokens)):  # by the tensor cores, and without
        if expected[:, part].numel():
            error = (found - expected)[:, part].norm() / expected[:, part].norm()
            assert error < (3e-2 if low else 5e-3)
