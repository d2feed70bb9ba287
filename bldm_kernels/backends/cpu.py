"""Backend `cpu`: C++ kernels of the extension `bldm_kernels._native`."""

from ..dispatch import Backend


def load() -> Backend:
    return Backend("cpu", ("cpu",), "not built")
