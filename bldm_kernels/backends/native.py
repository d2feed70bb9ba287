"""The compiled extension `bldm_kernels._native`, shared by the backends `cpu` and `cuda`."""

from types import ModuleType
from typing import Any


def load_part(name: str) -> tuple[ModuleType | None, str, dict[str, Any]]:
    """(submodule "cpu" or "cuda" or None, why it is not there, build information of the extension)."""
    try:
        from .. import _native  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        return None, "the extension was not built (no C++ compiler at installation, or BLDM_BUILD_CPU=0)", {}
    except ImportError as error:
        return None, f"the extension does not load: {error}", {}
    info: dict[str, Any] = _native.build_info
    part = getattr(_native, name, None)
    return part, "" if part else f"not built: {info[f'no_{name}']}", info
