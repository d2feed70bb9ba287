"""The backends under test and the devices they are tested on. Import this before bldm_kernels: it may turn the interpreter on."""

import os
from typing import NamedTuple

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported, so before bldm_kernels


class Target(NamedTuple):
    """A backend and the device its kernels are tested on."""

    backend: str
    device: str

    @property
    def fast(self) -> bool:
        """Fit for many and large inputs: Triton's interpreter is exact, but far too slow for them."""
        return HAS_GPU or self.backend in ("torch", "cpu")

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


TARGETS = [
    Target("torch", "cpu"),
    Target("cpu", "cpu"),
    Target("triton", "cuda" if HAS_GPU else "cpu"),
    Target("cuda", "cuda"),
    *([Target("torch", "cuda")] if HAS_GPU else []),
]
