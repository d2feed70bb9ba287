"""A CUDA build holds machine code for the GPUs it was built for: a wheel without any would only be noticed on a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bldm_kernels.backends.cuda import _has_code
from bldm_kernels.backends.native import load_part


def _cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ModuleNotFoundError:
        return None
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(carried) if carried.exists() else None


@pytest.fixture(scope="module")
def archs() -> list[str]:
    native, reason, info = load_part("cuda")
    if native is None:
        pytest.skip(f"no CUDA build: {reason}")
    return info["cuda_archs"].split(";")


def test_a_cuda_build_is_for_the_h200(archs: list[str]) -> None:
    assert _has_code(archs, 90), f"no code for sm_90 in {archs}"


def test_the_extension_holds_machine_code_and_ptx(archs: list[str]) -> None:
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump here")
    from bldm_kernels import _native  # type: ignore[attr-defined]

    def listed(kind: str) -> str:
        return subprocess.run([tool, f"--list-{kind}", _native.__file__], capture_output=True, text=True, check=True).stdout

    # layer_stack is of 90a, which not every cuobjdump tells from 90
    assert set(re.findall(r"\.sm_(\d+)a?\.cubin", listed("elf"))) == {arch.rstrip("a") for arch in archs}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", listed("ptx"))) == {archs[-1]}


def test_every_kernel_is_bound(archs: list[str]) -> None:
    from bldm_kernels import backends

    assert set(backends()["torch"].kernels) == set(backends()["cuda"].kernels)


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        ("90", 90, True),
        ("90", 89, False),
        ("90", 100, True),  # from the PTX
        ("80", 86, True),
        ("86;90", 80, False),
        ("80;90", 89, True),
        ("90a", 90, True),
        ("90a", 100, False),
    ],
)
def test_which_gpus_a_build_runs_on(built: str, capability: int, runs: bool) -> None:
    assert _has_code(built.split(";"), capability) == runs
