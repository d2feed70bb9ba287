"""Backend `cuda`: CUDA kernels of the extension `bldm_kernels._native`."""

from ..dispatch import Backend


def load() -> Backend:
    return Backend("cuda", ("cuda",), "not built")
