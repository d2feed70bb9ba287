"""Checkpoints: a folder with config.json and model.safetensors, there and back, and everything that is not one."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bldm
import pytest
import torch
from bldm.checkpoint import PretrainedModel, write_atomically
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import AUTOENCODER, DENOISER, tiny_autoencoder, tiny_denoiser, tiny_model
from torch import Tensor, nn

import bldm_kernels as bk


class Small(nn.Module, PretrainedModel):
    def __init__(self, size: int, names: list[str] | None = None, scale: float = 0.5):
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected >= 1, got {size}")
        self.names, self.scale = names, scale
        self.linear = nn.Linear(size, 2)
        self.register_buffer("count", torch.tensor(3))


class NoArguments(nn.Module, PretrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Small(3, names=["a", "b"]).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


# --- there and back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_text", [False, True])
def test_a_small_module(tmp_path: Path, as_text: bool) -> None:
    model = Small(3, names=["a", "b"], scale=0.25).train()
    path = tmp_path / "deep" / "folder"
    model.save_pretrained(str(path) if as_text else path)
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((path / "config.json").read_text()) == {"size": 3, "names": ["a", "b"], "scale": 0.25}
    loaded = Small.from_pretrained(str(path) if as_text else path)
    assert states_equal(loaded, model) and (loaded.names, loaded.scale) == (["a", "b"], 0.25)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (path / "config.json").read_bytes()


def test_a_module_without_arguments(tmp_path: Path) -> None:
    model = NoArguments()
    model.save_pretrained(tmp_path)
    assert states_equal(NoArguments.from_pretrained(tmp_path), model)


def answer(model: nn.Module) -> Tensor:
    """What a model computes, with everything it computes with."""
    if isinstance(model, bldm.BinaryAutoencoder):
        images = torch.linspace(-1, 1, 2 * 28 * 28).view(2, 1, 28, 28)
        return model.decode(model.encode(images))
    if isinstance(model, bldm.BinaryDenoiser):
        return model(bk.random_bits(3, (4, 8), seed=0), torch.tensor([1, 8, 16]), torch.tensor([0, 1, 2]))
    return model.sample(3, 2, labels=torch.arange(3), guidance_scale=2.0)


@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_denoiser, tiny_model])
def test_models(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert states_equal(loaded, model)
    with torch.no_grad():
        assert torch.equal(answer(loaded), answer(model))


def test_everything_a_sampler_needs_is_stored(tmp_path: Path) -> None:
    model = bldm.BinaryLatentDiffusion(
        autoencoder=AUTOENCODER,
        denoiser={**DENOISER, "num_classes": 2},
        schedule="cosine",
        num_steps=10,
        prediction="x_0",
        class_names=["one", "two"],
    )
    model.save_pretrained(tmp_path)
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(tmp_path)
    assert loaded.schedule == bk.BernoulliSchedule("cosine", 10)
    assert (loaded.prediction, loaded.class_names) == ("x_0", ["one", "two"])
    assert loaded.latent_shape == model.latent_shape


def test_half_precision_storage(tmp_path: Path) -> None:
    """Stored in two bytes a weight, loaded into the module's own dtype; integers stay what they are."""
    model = Small(300)
    expected = model.linear.weight.detach().half().float()
    model.save_pretrained(tmp_path / "full")
    model.half().save_pretrained(tmp_path / "half")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Small.from_pretrained(tmp_path / "half")
    assert loaded.linear.weight.dtype == torch.float32 and torch.equal(loaded.linear.weight, expected)
    assert loaded.count.dtype == torch.int64 and int(loaded.count) == 3


def test_saving_again_replaces_everything(folder: Path) -> None:
    model = Small(5)
    model.save_pretrained(folder)
    assert states_equal(Small.from_pretrained(folder), model)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# --- on the hub, which is a folder here -------------------------------------------------------------------------------
class FakeHub:
    """Stands in for HfApi: a repository is a folder, laid out as huggingface_hub's cache is, so that it reads it for real."""

    def __init__(self, cache: Path):
        self.cache, self.calls = cache, []

    def __call__(self, token: str | None = None) -> "FakeHub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str, **options: Any) -> str:
        self.calls.append(("upload_folder", repo_id, commit_message))
        commit = f"{len(self.calls):040x}"
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / (revision or "main")).write_text(commit)
        shutil.copytree(folder_path, repository / "snapshots" / commit)
        return f"https://hub/{repo_id}/commit/{commit}"

    def files(self, repo_id: str, revision: str = "main") -> Path:
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        return repository / "snapshots" / (repository / "refs" / revision).read_text()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_denoiser, tiny_model])
def test_models_on_the_hub(hub: FakeHub, make: Callable[[], Any]) -> None:
    model = make()
    url = model.push_to_hub("someone/tiny-model", token="secret", private=True, commit_message="First")
    assert hub.calls == [
        ("token", "secret"),
        ("create_repo", "someone/tiny-model", True, True),
        ("upload_folder", "someone/tiny-model", "First"),
    ]
    assert url.startswith("https://hub/someone/tiny-model/commit/")
    stored = hub.files("someone/tiny-model")
    assert {file.name for file in stored.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = type(model).from_pretrained("someone/tiny-model", cache_dir=hub.cache)
    assert states_equal(loaded, model) and not loaded.training
    with torch.no_grad():
        assert torch.equal(answer(loaded), answer(model))


def test_branches_and_the_same_commit_for_both_files(hub: FakeHub) -> None:
    Small(3).push_to_hub("someone/small")
    Small(5).push_to_hub("someone/small", branch="large")
    load = partial(Small.from_pretrained, "someone/small", cache_dir=hub.cache, local_files_only=True)
    assert load().linear.in_features == 3 and load(revision="large").linear.in_features == 5
    commit = hub.files("someone/small", "large").name
    assert load(revision=commit).linear.in_features == 5
    with pytest.raises(FileNotFoundError, match="^model: someone/small is no folder here, and the hub did not give it"):
        load(revision="huge")


def test_save_and_push_in_one_call(hub: FakeHub, tmp_path: Path) -> None:
    model = Small(3, scale=0.25)
    url = model.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="someone/small")
    assert url is not None and url.startswith("https://hub/someone/small/commit/")
    assert states_equal(Small.from_pretrained("someone/small", cache_dir=hub.cache), model)
    assert states_equal(Small.from_pretrained(tmp_path / "small"), model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_on_the_hub_is_checked_as_a_folder_is(hub: FakeHub, name: str) -> None:
    Small(3).push_to_hub("someone/small")
    (hub.files("someone/small") / name).write_text("{}" if name == "config.json" else "?")
    with pytest.raises(ValueError, match=f"^model: .*{name}"):
        Small.from_pretrained("someone/small", cache_dir=hub.cache)
    (hub.files("someone/small") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^model: .*someone--small.* has no {name}, so it is not a Small checkpoint"):
        Small.from_pretrained("someone/small", cache_dir=hub.cache)


def test_the_hub_has_no_such_model() -> None:
    expected = "^model: bldm-kernels/there-is-no-such-model is no folder here, and the hub did not give it"
    with pytest.raises(FileNotFoundError, match=expected):  # a name on the hub; nothing is asked of the network
        Small.from_pretrained("bldm-kernels/there-is-no-such-model", local_files_only=True)


def test_model_card(tmp_path: Path) -> None:
    model = tiny_denoiser()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("bldm-kernels", "mit")
    assert "binary-latent-diffusion" in card.data.tags
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    assert 'bldm.BinaryDenoiser.from_pretrained("user/name")' in card.text
    (tmp_path / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_a_config_of_ones_own_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    for save in (partial(Small(3).save_pretrained, tmp_path), partial(Small(3).push_to_hub, "someone/small")):
        with pytest.raises(ValueError, match="^config: a checkpoint holds the arguments its model was made with"):
            save(config={"size": 4})


def test_an_argument_instead_of_the_stored_one(folder: Path) -> None:
    assert Small.from_pretrained(folder, scale=2.0).scale == 2.0


# --- what is not a checkpoint -----------------------------------------------------------------------------------------
def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(f / "model.safetensors", -5), "model.safetensors is truncated or not safetensors"),
    "short": (lambda f: truncate(f / "model.safetensors", 12), "model.safetensors is truncated or not safetensors"),
    "empty": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is truncated or not safetensors"),
    "text": (
        lambda f: (f / "model.safetensors").write_text("weights? no. " * 99),
        "model.safetensors is truncated or not safetensors",
    ),
    "pickle": (
        lambda f: torch.save({"linear.weight": torch.zeros(2, 3)}, f / "model.safetensors"),
        "model.safetensors is a pickle; only safetensors are loaded",
    ),
    "old pickle": (
        lambda f: torch.save({}, f / "model.safetensors", _use_new_zipfile_serialization=False),
        "model.safetensors is a pickle; only safetensors are loaded",
    ),
    "bad JSON": (lambda f: truncate(f / "config.json", 20), "config.json is not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json is not the configuration of a Small"),
    "another class": (
        lambda f: rewrite_config(f, num_bits=8),
        r"config.json is not the configuration of a Small: unexpected \['num_bits'\]",
    ),
    "argument missing": (lambda f: (f / "config.json").write_text("{}"), "not the configuration of a Small.*size"),
    "bad value": (lambda f: rewrite_config(f, size=0), "not the configuration of a Small: size: expected >= 1, got 0"),
    "missing tensor": (
        lambda f: rewrite_weights(f, lambda s: s.pop("linear.bias")),
        r"model.safetensors does not fit its configuration: missing \['linear.bias'\], unexpected \[\], wrong shape \[\]",
    ),
    "extra tensor": (
        lambda f: rewrite_weights(f, lambda s: s.update(more=torch.zeros(1))),
        r"model.safetensors does not fit its configuration: missing \[\], unexpected \['more'\], wrong shape \[\]",
    ),
    "wrong shape": (
        lambda f: rewrite_config(f, size=4),
        r"model.safetensors does not fit its configuration: .* wrong shape \['linear.weight'\]",
    ),
    "prefix": (  # what loading without strictness would silently make an untrained model of
        lambda f: rewrite_weights(f, lambda s: s.update({f"module.{k}": s.pop(k) for k in list(s)})),
        r"missing \['count', 'linear.bias', 'linear.weight'\], unexpected \['module.count'",
    ),
}


@pytest.mark.parametrize("damage, expected", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints(folder: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s)^model: .*{expected}") as caught:
        Small.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^model: .*small has no {name}, so it is not a Small checkpoint"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_no_folder(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^model: no folder {path}"):
        Small.from_pretrained(path)


def test_a_file_instead_of_a_folder(folder: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"expected a folder with .*, got a pickle \(only safetensors are loaded\): .*pth"):
        Small.from_pretrained(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="expected a folder with config.json and model.safetensors, got a file: .*tensors"):
        Small.from_pretrained(folder / "model.safetensors")


def test_one_models_checkpoint_is_not_anothers(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    for cls in (bldm.BinaryDenoiser, bldm.BinaryLatentDiffusion):
        with pytest.raises(ValueError, match=f"config.json is not the configuration of a {cls.__name__}: unexpected"):
            cls.from_pretrained(tmp_path)


def test_a_pickle_is_never_executed(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    torch.save(Bomb(), folder / "model.safetensors")
    with pytest.raises(ValueError, match="pickle"):
        Small.from_pretrained(folder)
    assert not (folder / "exploded").exists()


# --- files whole or not at all ----------------------------------------------------------------------------------------
def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda name: Path(name).write_text("whole"))
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("before", [None, "before"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_raises_leaves_nothing(tmp_path: Path, before: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def write(name: str) -> None:
        Path(name).write_text("ha")
        raise error("disk full")

    with pytest.raises(error, match="disk full"):
        write_atomically(path, write)
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before
