"""`bldm encode`, `bldm nearest`, `bldm train --store`: from a data set to a store, and what is done with it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bldm
import numpy as np
import pytest
import torch
from bldm.cli.train import _precision as default_precision
from bldm.data import load_images, open_images, to_float
from bldm.store import encode_dataset
from bldm.store.encode import fingerprint
from bldm.training import denoiser as denoiser_training
from bldm.training.conditions import CaptionFeatures, caption_features
from bldm.training.loop import accelerator
from bldm.training.options import TrainOptions
from PIL import Image
from test_cli import fail, invoke
from test_conditions import LetterCounts
from tiny_models import tiny_model

# On a machine with a GPU too: bit for bit is a promise about the CPU.
os.environ["ACCELERATE_USE_CPU"] = "true"
TRAIN, TEST = 23, 9


@pytest.fixture(scope="module", autouse=True)
def single_thread(one_thread: None) -> None:
    """Models this small only wait for each other's threads."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An NPZ file of three classes, in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(["a", "b", "c"])}
    for split, count in (("train", TRAIN), ("test", TEST)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez("data.npz", **arrays)
    yield Path("data.npz")


CPU = ("--device", "cpu")
SHARDS = ("--shard-samples", 10, "--batch-size", 4)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# --- encode -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flip", [False, True])
def test_encode(model: Path, data: Path, flip: bool) -> None:
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    last = invoke("encode", data, "--model", model, "--out", "s", *SHARDS, *CPU, *(["--flip"] if flip else [])).splitlines()[-1]
    count = TRAIN * (1 + flip)
    size = int(np.prod(loaded.latent_shape)) // 8 + 8
    expected = (
        rf"s: {count} latents of {re.escape(str(loaded.latent_shape))} bits, {size} bytes each in \d+\.\d s \(\d+ a second\)"
    )
    assert re.fullmatch(expected, last)
    store = bldm.LatentStore("s", verify=True)
    assert store.complete and len(store) == count and store.samples_per_shard == 10
    images = load_images(data)
    x = to_float(images.images)
    latents = loaded.encode(torch.cat([x, x.flip(-1)]) if flip else x)
    assert torch.equal(store[:]["packed"], latents)
    assert torch.equal(store[:]["label"], images.labels.repeat(1 + flip))  # type: ignore[union-attr]
    about = {name: store.metadata[name] for name in ("split", "mirrored", "samples", "class_names")}
    assert about == {"split": "train", "mirrored": flip, "samples": count, "class_names": ["a", "b", "c"]}
    before = contents(Path("s"))
    again = invoke("encode", data, "--model", model, "--out", "s", *SHARDS, *CPU, *(["--flip"] if flip else [])).splitlines()[-1]
    assert again.endswith(f"bytes each ({count} were there)") and contents(Path("s")) == before


@pytest.mark.parametrize("seen", [0, 9, 10, 13, 22, 30, 45])
def test_encode_goes_on_after_an_interruption(model: Path, data: Path, seen: int) -> None:
    """With batches of 4 and shards of 10 samples, of 23 images and their mirror images."""
    autoencoder = bldm.BinaryLatentDiffusion.from_pretrained(model).autoencoder.eval()
    images = open_images(data)
    options: dict[str, Any] = {"batch_size": 4, "mirrored": True, "samples_per_shard": 10, "metadata": {"split": "train"}}
    encode_dataset(autoencoder, images, "whole", **options)

    def stop(done: int) -> None:
        if done >= seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(autoencoder, images, "parts", progress=stop, **options)
    there = len(bldm.LatentStore("parts"))
    assert there <= seen + 3 and there % 10 == 0 and (seen < 10 or there > 0)
    output = invoke("encode", data, "--model", model, "--out", "parts", "--flip", *SHARDS, *CPU).splitlines()[-1]
    assert (f"({there} were there)" in output) == (there > 0)
    assert contents(Path("parts")) == contents(Path("whole"))


def test_encode_a_folder_of_pictures_with_an_autoencoder_alone(data: Path) -> None:
    torch.manual_seed(0)
    autoencoder = bldm.BinaryAutoencoder(image_size=8, in_channels=3, num_bits=13, base_channels=4, channel_multipliers=(1, 1))
    autoencoder.save_pretrained("ae")
    rng = np.random.default_rng(1)
    for name in ("dog/1.png", "dog/2.png", "cat/3.png"):
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(Path("pictures", name))
    invoke("encode", "pictures", "--model", "ae", "--out", "s", *CPU)
    store = bldm.LatentStore("s")
    assert store[:]["label"].tolist() == [0, 1, 1] and store.metadata["class_names"] == ["cat", "dog"]
    images = load_images("pictures", image_size=8).images
    assert torch.equal(store[:]["packed"], autoencoder.eval().encode(to_float(images)))
    invoke("nearest", "pictures/dog/2.png", "--store", "s", "--model", "ae", "--k", 1, *CPU)
    assert store.nearest(autoencoder.encode(to_float(images[2:])), 1)[0].item() == 0


def test_encode_refuses_what_does_not_belong_together(model: Path, data: Path) -> None:
    arguments = ("encode", data, "--out", "s", *CPU)
    invoke(*arguments, "--model", model)
    assert "metadata['split']: the store s was begun with train, got test" in fail(
        *arguments, "--model", model, "--split", "test"
    )
    other = bldm.BinaryLatentDiffusion.from_pretrained(model)
    with torch.no_grad():
        other.autoencoder.embedding.add_(1)
    other.save_pretrained("other")
    assert "metadata['autoencoder']: the store s was begun with" in fail(*arguments, "--model", "other")
    invoke(*arguments[:3], "t", *CPU, "--model", "other")
    assert "model: no folder nowhere" in fail(*arguments, "--model", "nowhere")
    Path("empty").mkdir()
    assert "model: empty has no config.json" in fail(*arguments, "--model", "empty")
    bldm.BinaryAutoencoder(image_size=28, in_channels=3, base_channels=4, channel_multipliers=(1, 1)).save_pretrained("rgb")
    assert "data: expected images of shape (3, 28, 28) for this autoencoder, got (1, 28, 28)" in fail(
        *arguments, "--model", "rgb"
    )
    path = Path("s/shard-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is truncated"):
        assert "s/shard-00000.safetensors is truncated" in fail(*arguments, "--model", model)


# --- nearest ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def store(model: Path, data: Path) -> bldm.LatentStore:
    invoke("encode", data, "--model", model, "--out", "store", *SHARDS, *CPU)
    return bldm.LatentStore("store")


def table(output: str) -> list[list[str]]:
    """The cells of the rows of the table."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if line.startswith("│")]


def test_nearest_of_images(model: Path, data: Path, store: bldm.LatentStore) -> None:
    output = invoke("nearest", data, "--model", model, "-n", 4, "-k", 3, "--split", "train", "--out", "new/n.png", *CPU)
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    distances, indices = store.nearest(loaded.encode(to_float(load_images(data).images[:4])), 3)
    names = ["a", "b", "c"]
    expected = [
        [str(row), *(f"{i} {names[i % 3]}: {d}" for i, d in zip(indices[row].tolist(), distances[row].tolist(), strict=True))]
        for row in range(4)
    ]
    assert table(output) == expected and indices[:, 0].tolist() == [0, 1, 2, 3]
    assert (
        output.splitlines()[-1]
        == "new/n.png: 4 queries differ from their nearest latent in 0.00% of the bits; 4 are in the store"
    )
    with Image.open("new/n.png") as picture:
        assert picture.size == (4 * 90 + 6, 4 * 106 + 6)
    output = invoke("nearest", data, "--model", model, *CPU)  # all defaults: 5 of each of 8 test images
    assert [len(row) for row in table(output)] == [6] * 8 and Path("nearest.png").is_file()


def test_nearest_of_packed_latents(model: Path, store: bldm.LatentStore) -> None:
    bldm.PackedLatents(store[[20, 3]]["packed"], store.latent_shape).save("latents")
    output = invoke("nearest", "latents", "--model", model, "--k", 2, *CPU)
    assert [row[1] for row in table(output)] == ["20 c: 0", "3 a: 0"]
    assert "2 are in the store" in output
    rows = table(invoke("nearest", "store/shard-00001.safetensors", "--model", model, "--k", 1, *CPU))  # a shard is such a file
    assert [row[1].split()[0] for row in rows] == [str(i) for i in range(10, 18)]


def test_nearest_of_fresh_samples(model: Path, store: bldm.LatentStore) -> None:
    options = ("--model", model, "-n", 3, "-k", 1, "--steps", 3, "--seed", 5, *CPU)
    rows = table(invoke("nearest", *options))
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    painted = loaded.sampler().sample(3, 3, seed=5, cond=torch.tensor([0, 1, 2]), guidance_scale=2.0)
    distances, indices = store.nearest(painted, 1)
    assert [row[1] for row in rows] == [f"{i} {'abc'[i % 3]}: {d}" for i, d in zip(indices[:, 0], distances[:, 0], strict=True)]


def test_nearest_says_what_is_wrong(model: Path, data: Path, store: bldm.LatentStore) -> None:
    arguments = ("nearest", data, "--model", model, *CPU)
    assert "store: nowhere has no index.json" in fail(*arguments, "--store", "nowhere")
    assert f"k: expected 1 <= k <= {TRAIN}, got 24" in fail(*arguments, "--k", TRAIN + 1)
    assert "bits, the model has" in fail("nearest", data, *CPU)  # the bundled model has another grid
    bldm.PackedLatents(torch.zeros(2, 3, 1, dtype=torch.uint8), (3, 8)).save("other")
    assert "query: other holds latents of (3, 8) bits, the store of" in fail("nearest", "other", "--model", model, *CPU)
    assert "nothing" in fail("nearest", "nothing", "--model", model, *CPU)


CAPTIONS = [["sass", "a b"], ["bbb"], ["s", "sa", "sab"]]


@pytest.mark.parametrize("text", ["vector", "tokens"])
@pytest.mark.parametrize("flip", [False, True])
def test_encode_captions(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flip: bool) -> None:
    """A sample for every caption, mirror images after all of them; going on after an interruption in the middle of an image."""
    monkeypatch.setattr("bldm.training.conditions.TextEncoder", LetterCounts)
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
    about = {f"{i}.png": {"captions": texts} for i, texts in enumerate(CAPTIONS)}
    Path("pictures/captions.json").write_text(json.dumps(about))
    autoencoder = bldm.BinaryAutoencoder(image_size=28, in_channels=3, num_bits=4, base_channels=4).eval()
    autoencoder.save_pretrained("ae")
    options = ("--model", "ae", "--text", text, "--shard-samples", 4, "--batch-size", 2, *CPU, *(["--flip"] if flip else []))
    images = to_float(load_images(Path("pictures"), image_size=28).images)
    packed = torch.cat([autoencoder.encode(x) for x in ([images, images.flip(-1)] if flip else [images])])
    said = [caption for group in CAPTIONS for caption in group]
    features = LetterCounts().encode(said, tokens=text == "tokens").half()

    assert f"s: {len(said) * (1 + flip)} latents" in invoke("encode", "pictures", "--out", "s", *options)
    store = bldm.LatentStore("s")
    assert store.metadata["text_encoder"] == "all-MiniLM-L6-v2"
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5][: len(store)])
    assert torch.equal(store[:]["packed"], packed[rows])
    assert torch.equal(store[:]["text"], torch.cat([features] * (1 + flip)))
    whole = contents(Path("s"))
    assert "were there" in invoke("encode", "pictures", "--out", "s", *options)

    def interrupt(done: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    pictures, captions = open_images(Path("pictures"), image_size=28), caption_features(CAPTIONS, tokens=text == "tokens")
    same_options: dict[str, Any] = {"batch_size": 2, "mirrored": flip, "samples_per_shard": 4, "metadata": {"split": "train"}}
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(autoencoder, pictures, "t", captions=captions, progress=interrupt, **same_options)
    assert "(4 were there)" in invoke("encode", "pictures", "--out", "t", *options)
    assert contents(Path("t")) == whole

    sizes = ("--width", 16, "--depth", 1, "--heads", 2, "--num-steps", 16, "--steps", 2, "--batch-size", 4)
    invoke("train", "--autoencoder", "ae", "--store", "s", "--out", "model", *sizes)
    trained_on_text = bldm.BinaryLatentDiffusion.from_pretrained("model")
    assert trained_on_text.denoiser.text_width == 3 and trained_on_text.denoiser.cross_attention == (text == "tokens")


# --- training from a store --------------------------------------------------------------------------------------------
SIZES = {"width": 16, "depth": 1, "num_heads": 2}


def trained(model: Path, data: Any, out: Path, **options: Any) -> bldm.BinaryLatentDiffusion:
    assert accelerator().device.type == "cpu"  # where `bldm encode` is told to work here too
    training = TrainOptions(steps=5, batch_size=6)
    return denoiser_training.train_denoiser(model, SIZES, data, training, out, num_steps=16, **options)


def test_training_on_a_store_is_training_on_the_images(model: Path, data: Path, tmp_path: Path) -> None:
    loaded = bldm.BinaryLatentDiffusion.from_pretrained(model)
    loaded.autoencoder.save_pretrained("ae")
    invoke("encode", data, "--model", "ae", "--out", "s", "--flip", *SHARDS, *CPU)
    one = trained(Path("ae"), load_images(data), tmp_path / "one", flip=True)
    other = trained(Path("ae"), bldm.LatentStore("s"), tmp_path / "other")
    assert other.class_names == ["a", "b", "c"]
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    sizes = ("--width", 16, "--depth", 1, "--heads", 2, "--num-steps", 16, "--steps", 5, "--batch-size", 6, "--lr", 1e-3)
    invoke("train", "--autoencoder", "ae", "--store", "s", "--out", "third", *sizes, "--ema-decay", 0.999)
    third = bldm.BinaryLatentDiffusion.from_pretrained("third").state_dict()
    assert all(torch.equal(value, third[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(("device", "precision"), [("cpu", "no"), ("cuda", "bf16")])
def test_precision_is_by_default_that_of_the_device_which_trains(
    device: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of any GPU that the machine has."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bldm.training.loop.accelerator", lambda: SimpleNamespace(device=torch.device(device)))
    assert default_precision(None) == precision and default_precision("no") == "no"


def test_training_refuses_a_store_that_does_not_fit(model: Path, data: Path, tmp_path: Path) -> None:
    autoencoder = bldm.BinaryLatentDiffusion.from_pretrained(model).autoencoder
    autoencoder.save_pretrained("ae")
    train = ("train", "--autoencoder", "ae", "--steps", 1, "--out", "out")
    invoke("encode", data, "--model", "ae", "--out", "s", *CPU)
    assert "data, store: expected one of them, got both" in fail(*train, data, "--store", "s")
    assert "data, store: expected one of them, got none" in fail(*train)
    assert "max_train_samples: a store is used whole" in fail(*train, "--store", "s", "--max-train-samples", 3)
    assert "flip, copies: the latents of a store" in fail(*train, "--store", "s", "--flip")
    assert "store: nowhere has no index.json" in fail(*train, "--store", "nowhere")
    with bldm.LatentStore.writer("t", (3, 8)) as writer:
        writer.append(torch.zeros(2, 3, 1, dtype=torch.uint8))
    assert "does not hold latents of" in fail(*train, "--store", "t")
    bldm.LatentStore.writer("u", autoencoder.latent_shape).close()
    assert "store: u is not complete; run the same bldm encode again" in fail(*train, "--store", "u")
    with bldm.LatentStore.writer("v", autoencoder.latent_shape, metadata={"autoencoder": "of another one"}) as writer:
        writer.append(bldm.LatentStore("s")[:4]["packed"])
    assert "store: v was filled by an autoencoder with other weights" in fail(*train, "--store", "v")
    assert fingerprint(autoencoder) == bldm.LatentStore("s").metadata["autoencoder"]
    path = Path("s/shard-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    assert "s/shard-00000.safetensors does not match its checksum" in fail(*train, "--store", "s")


def test_training_without_labels(model: Path, data: Path, tmp_path: Path) -> None:
    autoencoder = bldm.BinaryLatentDiffusion.from_pretrained(model).autoencoder
    autoencoder.save_pretrained("ae")
    with bldm.LatentStore.writer("s", autoencoder.latent_shape) as writer:
        writer.append(autoencoder.encode(to_float(load_images(data).images)))
    assert trained(Path("ae"), bldm.LatentStore("s"), tmp_path / "out").denoiser.num_classes is None


@pytest.mark.parametrize("tokens", [False, True])
def test_training_on_texts(model: Path, data: Path, tmp_path: Path, tokens: bool) -> None:
    """The same as with the captions given beside the store."""
    autoencoder = bldm.BinaryLatentDiffusion.from_pretrained(model).autoencoder
    autoencoder.save_pretrained("ae")
    packed = autoencoder.encode(to_float(load_images(data).images))
    text = torch.randn(TRAIN, *([4, 6] if tokens else [6]), generator=torch.Generator().manual_seed(0)).half()
    lengths = torch.arange(TRAIN) % 4 + 1
    if tokens:
        text = text * (torch.arange(4) < lengths[:, None])[..., None]
    columns: dict[str, Any] = {"text": (text.shape[1:], torch.float16), "label": ((), torch.int64)}
    about = {"text_encoder": "all-MiniLM-L6-v2"}
    with bldm.LatentStore.writer("s", autoencoder.latent_shape, columns, metadata=about) as writer:
        writer.append(packed, text=text, label=torch.zeros(TRAIN, dtype=torch.int64))
    with bldm.LatentStore.writer("plain", autoencoder.latent_shape) as writer:
        writer.append(packed)
    one = trained(Path("ae"), bldm.LatentStore("s"), tmp_path / "one")
    assert one.denoiser.text_width == 6 and one.denoiser.cross_attention == tokens and one.text_encoder == "all-MiniLM-L6-v2"
    features = text[torch.arange(4) < lengths[:, None]] if tokens else text
    captions = CaptionFeatures(
        features, lengths if tokens else None, torch.arange(TRAIN), torch.ones(TRAIN, dtype=torch.int64), "all-MiniLM-L6-v2"
    )
    other = trained(Path("ae"), bldm.LatentStore("plain"), tmp_path / "other", captions=captions).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items())
