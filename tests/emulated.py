"""Kernels of compute capability 9.0 built for the emulated machine of tests/emulator."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, *sources: str) -> ctypes.CDLL:
    """A library of these sources of tests/emulator; its functions return a text, "" for a run without errors."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler and an x86-64 processor")
    library = folder / "emulated.so"
    flags = ["-std=c++20", "-O3", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{ROOT}/tests/emulator", f"-I{ROOT}/csrc"]
    paths = [ROOT / "tests/emulator" / name for name in (*sources, "switch.cpp")]
    subprocess.run([compiler, *flags, *paths, "-o", library], check=True, timeout=300)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded
