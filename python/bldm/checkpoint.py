"""PretrainedModel: a folder with config.json and model.safetensors, on disk or on the Hugging Face hub."""

import inspect
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Model = TypeVar("Model", bound="PretrainedModel")


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
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_folder(model_id: str, cls: type) -> None:
    """A local path must hold a checkpoint of this library; a name that is no path is left to the hub."""
    path = Path(model_id)
    if path.is_file():
        kind = "a pickle (only safetensors are loaded)" if _is_pickle(path) else "a file"
        raise ValueError(f"model: expected a folder with {CONFIG} and {WEIGHTS}, got {kind}: {path}")
    if path.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise FileNotFoundError(f"model: {path} has no {name}, so it is not a {cls.__name__} checkpoint")
        _read_config(path / CONFIG, cls)
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_id, re.ASCII):
        raise FileNotFoundError(f"model: no folder {model_id}")


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


class PretrainedModel(ModelHubMixin, library_name="bldm-kernels", license="mit", tags=["binary-latent-diffusion"]):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to an nn.Module whose arguments are JSON values.

    Weights load into the module's own dtype, so a checkpoint may be stored smaller: `model.half().save_pretrained(path)`.
    `from_pretrained` raises ValueError or FileNotFoundError, naming the file, for anything that is not a whole checkpoint of the
    class; pickles are never loaded.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        # Written last by us, not by the mixin, so that a folder with a config always has its weights.
        state = {name: value.contiguous() for name, value in self.state_dict().items()}  # type: ignore[attr-defined]
        write_atomically(save_directory / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        text = json.dumps(self._hub_mixin_config or {}, indent=2, sort_keys=True) + "\n"
        write_atomically(save_directory / CONFIG, lambda path: Path(path).write_text(text))

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Model:
        """Load from a folder, or from a hub repository "user/name". `map_location` names the device (default "cpu")."""
        name = str(pretrained_model_name_or_path)
        _check_folder(name, cls)
        try:
            return super().from_pretrained(name, **kwargs)
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(f"model: {name} is no folder here, and the hub did not give it: {error}") from error

    @classmethod
    def _from_pretrained(
        cls: type[Model],
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Model:
        if os.path.isdir(model_id):
            path = Path(model_id) / WEIGHTS
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
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
