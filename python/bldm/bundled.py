"""The model that ships with the package: a class-conditional Fashion-MNIST generator."""

from importlib.resources import as_file, files
from pathlib import Path

NAME = "fashion-mnist"


def bundled_model() -> Path:
    """Folder of the bundled checkpoint (config.json, model.safetensors, README.md)."""
    with as_file(files("bldm") / "pretrained" / NAME) as path:
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"model: the bundled model is missing from this installation ({path})")
        return path
