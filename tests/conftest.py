"""Where the tests run: every kernel test is parametrised over (backend, device).

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, and only `cuda` is skipped. Nothing else is ever
skipped: a backend that should be here and is not is a failure. Two environment variables change that, both on purpose:

    BLDM_TEST_ALLOW_MISSING=cpu,triton   these backends, or packages of the test extra, may be missing (skipped, with the reason)
    BLDM_TEST_REQUIRE_GPU=1              a machine without a GPU is a failure, not a skip
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from targets import HAS_GPU, TARGETS, Target

import bldm_kernels as bk

ALLOW_MISSING = os.environ.get("BLDM_TEST_ALLOW_MISSING", "").split(",")
REQUIRE_GPU = os.environ.get("BLDM_TEST_REQUIRE_GPU") == "1"


def require_gpu() -> None:
    if not HAS_GPU:
        (pytest.fail if REQUIRE_GPU else pytest.skip)("no GPU on this machine")


def require_backend(name: str) -> None:
    """Fail if backend `name` is missing (skip if BLDM_TEST_ALLOW_MISSING names it)."""
    if name == "cuda":
        require_gpu()
    reason = bk.backends()[name].unavailable
    if reason is not None:
        (pytest.skip if name in ALLOW_MISSING else pytest.fail)(f"backend {name!r} is not available: {reason}")


def require_package(name: str) -> None:
    """For the top of a test file: skip it if package `name` is missing and BLDM_TEST_ALLOW_MISSING names it."""
    if name in ALLOW_MISSING and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in turn, forced, so that no other one can answer for it."""
    require_backend(request.param.backend)
    with bk.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def cpu_backend() -> Iterator[None]:
    """The C++ backend, forced."""
    require_backend("cpu")
    with bk.use_backend("cpu"):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> list[str]:
    lines = [f"{b.name}: {b.unavailable or b.details or 'available'}" for b in bk.backends().values()]
    return [f"bldm_kernels {bk.__version__}, torch {torch.__version__}", *lines]
