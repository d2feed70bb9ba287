"""The models that ship with the package: a class-conditional Fashion-MNIST generator, and emoji painted from words."""

from importlib.resources import as_file, files
from pathlib import Path

from bldm_kernels import checks

NAMES = ("fashion-mnist", "emoji")


def bundled_model(name: str = "fashion-mnist") -> Path:
    """Folder of a bundled checkpoint (config.json, model.safetensors, README.md): "fashion-mnist" or "emoji".

    Raises: ValueError for another name, FileNotFoundError where this installation lacks it.
    """
    checks.option("name", name, NAMES)
    with as_file(files("bldm") / "pretrained" / name) as path:
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"model: the bundled model {name} is missing from this installation ({path})")
        return path
