"""Whether a Triton kernel of this package may run: on a GPU, or wherever the backend "triton" is forced."""

import torch

from .. import dispatch


def triton_runs_on(device: torch.device) -> bool:
    backend, forced = dispatch.backends()["triton"], dispatch.forced_backend()
    if backend.unavailable is not None or device.type not in backend.devices:
        return False
    return forced == "triton" or (forced != "torch" and device.type == "cuda")
