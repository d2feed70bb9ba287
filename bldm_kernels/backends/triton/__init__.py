"""Backend `triton`: kernels compiled just in time on a GPU, or interpreted on a CPU under TRITON_INTERPRET=1."""

from ...dispatch import Backend


def load() -> Backend:
    return Backend("triton", ("cuda",), "not written")
