"""What is installed, what each backend offers and why one is missing: `bldm doctor`, `python -m bldm_kernels`."""

import importlib.metadata
import os
import platform
import sys

import torch

from .dispatch import backends, select

PACKAGES = ("bldm-kernels", "torch", "triton", "numpy", "safetensors")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend_of(op: str, device: str) -> str:
    kernel = select(op, torch.device(device))
    return next(name for name, backend in backends().items() if backend.kernels.get(op) is kernel)


def report() -> list[tuple[str, str]]:
    """(heading, text) lines describing the machine, the packages and every backend."""
    lines = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"),
        *((package, _version(package)) for package in PACKAGES),
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = properties.total_memory / 2**30
            lines.append((f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}, {size:.0f} GiB"))
    else:
        lines.append(("cuda", f"no GPU visible (torch built for CUDA: {torch.version.cuda or 'no'})"))
    for name, backend in backends().items():
        state = backend.unavailable and f"unavailable: {backend.unavailable}"
        lines.append((f"backend {name}", state or f"{len(backend.kernels)} ops; {backend.details}"))
    for device in devices:
        chosen = {op: _backend_of(op, device) for op in sorted(backends()["torch"].kernels)}
        groups = {b: [op for op, c in chosen.items() if c == b] for b in dict.fromkeys(chosen.values())}
        text = "; ".join(f"{b}: {', '.join(ops)}" if len(groups) > 1 else f"{b}: every op" for b, ops in groups.items())
        lines.append((f"used on {device}", text))
    return lines


def main() -> None:
    for heading, text in report():
        print(f"{heading:<16} {text}")
