"""The C++ kernels are built for several instruction sets and use the best: the others must give the same bits."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ALL = ("portable", "avx2", "avx512")
TESTS = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("isa", ALL)
def test_other_instruction_sets(isa: str) -> None:
    """The table of cases, the stream and the million bits again, in a process that is told which kernels to use."""
    native = importlib.import_module("bldm_kernels._native").cpu
    if isa == native.isa:
        return  # what every other test runs
    if isa not in native.supported_isas:
        pytest.skip(f"this processor has no {isa}")
    files = [str(TESTS / name) for name in ("test_ops_agree.py", "test_random_stream.py", "test_batch_split.py")]
    chosen = "cpu-cpu and not transposed and not strided and not expanded"  # those are made contiguous before the kernel
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
    environment = {**os.environ, "BLDM_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"cpu: C++ for {isa}" in done.stdout  # from conftest's report header


def test_unknown_instruction_set_is_an_error() -> None:
    code = "import bldm_kernels as bk; print(bk.backends()['cpu'].unavailable)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BLDM_CPU_ISA": "mmx"}, capture_output=True, text=True, timeout=120
    )
    assert "BLDM_CPU_ISA: no such kernels: mmx" in done.stdout + done.stderr
