"""PretrainedModel: a folder with config.json and model.safetensors, on disk or on the Hugging Face hub."""

import inspect
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Model = TypeVar("Model", bound="PretrainedModel")
MODEL_CARD = """---
{{ card_data }}
---
# {{ model_class }}

{{ num_parameters }} parameters, made with bldm-kernels: [binary latent diffusion]({{ paper_url }}).

```python
import bldm

model = bldm.{{ model_class }}.from_pretrained("user/name")  # or a folder
```
"""


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary path)` beside `path`, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        fsync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; where folders cannot be opened (Windows), the file system does so by itself."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def find_folder(name: str, **hub_options: Any) -> Path:
    """A folder here, or else that of a hub repository "user/name", both of whose files are then of the same commit."""
    path = Path(name)
    if path.is_file():
        kind = "a pickle (only safetensors are loaded)" if _is_pickle(path) else "a file"
        raise ValueError(f"model: expected a folder with {CONFIG} and {WEIGHTS}, got {kind}: {path}")
    if path.is_dir():
        return path
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII):
        raise FileNotFoundError(f"model: no folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **hub_options))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"model: {name} is no folder here, and the hub did not give it: {error}") from error


def _check_folder(path: Path, cls: type) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"model: {path} has no {name}, so it is not a {cls.__name__} checkpoint")
    _read_config(path / CONFIG, cls)


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4)
    return head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04"


def _read_config(path: Path, cls: type) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model: {path} is not valid JSON: {error}") from None
    known = set(inspect.signature(cls).parameters)
    if not isinstance(config, dict) or not set(config) <= known:
        extra = sorted(set(config) - known) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"model: {path} is not the configuration of a {cls.__name__}: unexpected {extra}")
    return config


class PretrainedModel(
    ModelHubMixin,
    library_name="bldm-kernels",
    license="mit",
    tags=["binary-latent-diffusion"],
    paper_url="https://arxiv.org/abs/2304.04820",
    model_card_template=MODEL_CARD,
):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to an nn.Module whose arguments are JSON values.

    Weights load into the module's own dtype, so a checkpoint may be stored smaller: `model.half().save_pretrained(path)`.
    `from_pretrained` raises ValueError or FileNotFoundError, naming the file, for anything that is not a whole checkpoint of the
    class, here or on the hub; pickles are never loaded.
    """

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **options: Any) -> str | None:
        """Write config.json, model.safetensors and, where there is none, README.md; with `push_to_hub=True` upload them too.

        `config` is the mixin's and may only say what the model's own arguments are; other options as in
        `huggingface_hub.ModelHubMixin.save_pretrained`. Returns the URL of the commit if it was uploaded.
        """
        if config is not None and config != self._hub_mixin_config:
            raise ValueError("config: a checkpoint holds the arguments its model was made with, expected None")
        return super().save_pretrained(save_directory, config=config, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        # Written last by us, not by the mixin, so that a folder with a config always has its weights.
        state = {name: value.contiguous() for name, value in self.state_dict().items()}  # type: ignore[attr-defined]
        write_atomically(save_directory / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        text = json.dumps(self._hub_mixin_config or {}, indent=2, sort_keys=True) + "\n"
        write_atomically(save_directory / CONFIG, lambda path: Path(path).write_text(text))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        count = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        about = {"model_class": type(self).__name__, "num_parameters": f"{count:,}"}
        return super().generate_model_card(*args, **{**about, **kwargs})

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Model:
        """Load from a folder, or from a hub repository "user/name".

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            force_download, token, cache_dir, local_files_only, revision: for the hub, as in `huggingface_hub.snapshot_download`.
            kwargs: `map_location` names the device (default "cpu"); others are arguments of the class instead of those stored.
        """
        folder = find_folder(
            str(pretrained_model_name_or_path),
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        _check_folder(folder, cls)
        return super().from_pretrained(folder, **kwargs)

    @classmethod
    def _from_pretrained(
        cls: type[Model],
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Model:
        path = Path(model_id) / WEIGHTS  # always a folder here; the mixin passes the rest all the same
        try:
            state = load_file(path)
        except SafetensorError as error:
            kind = "a pickle; only safetensors are loaded" if _is_pickle(path) else f"truncated or not safetensors: {error}"
            raise ValueError(f"model: {path} is {kind}") from None
        try:
            model: Any = cls(**model_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {CONFIG} of {model_id} is not the configuration of a {cls.__name__}: {error}") from None
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
            raise ValueError(
                f"model: {path} does not fit its configuration: missing {sorted(expected.keys() - found.keys())}, "
                f"unexpected {sorted(found.keys() - expected.keys())}, wrong shape {wrong}"
            )
        model.load_state_dict(state)
        return model.to(map_location).eval()
