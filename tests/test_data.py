"""load_images: IDX files, NPZ archives, folders of pictures, and what is said about data that is not right."""

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bldm.data import KNOWN_CLASSES, load_images, to_float
from PIL import Image

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (12, 6, 5), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, split: str = "train", ending: str = "", labels: np.ndarray = LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", IMAGES), ("labels-idx1", labels)):
        data = idx(array)
        (folder / f"{split}-{name}-ubyte{ending}").write_bytes(gzip.compress(data) if ending else data)
    return folder


def write_pictures(folder: Path, names: tuple[str, ...], size: tuple[int, int] = (8, 8)) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (20 * i, 0, 255)).save(folder / name)
    return folder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(tmp_path: Path, ending: str) -> None:
    write_idx(tmp_path, "t10k", ending)
    data = load_images(tmp_path, "test")
    assert len(data) == 12 and data.images.dtype == torch.uint8 and data.class_names is None
    assert np.array_equal(data.images.numpy(), IMAGES[:, None])
    assert data.labels is not None and data.labels.dtype == torch.int64 and data.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw"])
def test_known_data_sets_have_class_names(tmp_path: Path, folder: str) -> None:
    names = load_images(write_idx(tmp_path / folder)).class_names
    assert names == KNOWN_CLASSES["fashionmnist"] and names is not None
    assert (names[0], names[8], names[9], len(names)) == ("T-shirt/top", "Bag", "Ankle boot", 10)


@pytest.mark.parametrize("folder", ["not-mnist", "things"])
def test_other_data_sets_have_none(tmp_path: Path, folder: str) -> None:
    assert load_images(write_idx(tmp_path / folder)).class_names is None
    assert load_images(write_idx(tmp_path / "mnist", labels=LABELS + 1)).class_names is None  # labels up to 10: not that one


@pytest.mark.parametrize("shape", [(12, 6, 5), (12, 6, 5, 1), (12, 6, 5, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = GENERATOR.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=LABELS, class_names=np.array(list("abcdefghij")))
    data = load_images(tmp_path / "a.npz")
    assert data.images.shape == (12, shape[3] if len(shape) == 4 else 1, 6, 5)
    assert np.array_equal(data.images.movedim(1, -1).reshape(shape).numpy(), images)
    assert data.class_names == list("abcdefghij")
    assert data.labels is not None and data.labels.tolist() == LABELS.tolist()


def test_npz_splits_and_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=IMAGES, test_images=IMAGES[:2], test_labels=LABELS[:2])
    train, test = load_images(tmp_path / "a.npz"), load_images(tmp_path / "a.npz", "test")
    assert train.labels is None and len(train) == 12
    assert test.labels is not None and len(test) == 2


def test_folder_of_class_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("train/shoe/a.png", "train/bag/b.jpg", "train/bag/deep/c.png", "test/bag/d.png"))
    data = load_images(tmp_path, image_size=4)
    assert data.images.shape == (3, 3, 4, 4) and data.images.dtype == torch.uint8
    assert data.class_names == ["bag", "shoe"]
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1]
    assert len(load_images(tmp_path, "test", 4)) == 1


def test_the_other_split_is_no_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("train/bag/a.png",))
    with pytest.raises(ValueError, match="data: .*test holds no IDX files, or pictures"):
        load_images(tmp_path, "test", 4)


def test_pictures_are_cropped_to_the_middle(tmp_path: Path) -> None:
    picture = np.zeros((4, 12, 3), np.uint8)
    picture[:, 4:8] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    data = load_images(tmp_path, image_size=2)
    assert data.labels is None and data.class_names is None
    assert data.images.unique().tolist() == [200]


def test_to_float() -> None:
    x = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(x, torch.tensor([-1.0, -0.6, 1.0]))


def corrupt(name: str, change: Callable[[bytes], bytes], ending: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_idx(folder, ending=ending)
        path = folder / f"train-{name}-ubyte{ending}"
        path.write_bytes(change(path.read_bytes()))
        return folder

    return make


def npz(**arrays: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "a.npz", **arrays)
        return folder / "a.npz"

    return make


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A file that starts as a good NPZ archive."""

    def make(folder: Path) -> Path:
        npz(images=IMAGES)(folder)
        (folder / name).write_bytes(change((folder / "a.npz").read_bytes()))
        return folder / name

    return make


def without_labels(folder: Path) -> Path:
    (write_idx(folder) / "train-labels-idx1-ubyte").unlink()
    return folder


def array_file(folder: Path) -> Path:
    np.save(folder / "a.npy", IMAGES)
    return folder / "a.npy"


def half_a_picture(ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"a.{ending}"
        Image.fromarray(GENERATOR.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return folder

    return make


def not_a_picture(folder: Path) -> Path:
    (folder / "a.png").write_text("hello")
    return folder


I3, L1 = "images-idx3", "labels-idx1"
ERRORS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("nothing", lambda p: p / "none", "data: no file or folder .*none"),
    ("empty folder", lambda p: p, r"data: .* holds no IDX files, or pictures \(.*\.png"),
    ("truncated", corrupt(I3, lambda b: b[:-1]), "images-idx3-ubyte is truncated or too long: expected 376 bytes .*, got 375"),
    ("too long", corrupt(I3, lambda b: b + b"x"), "images-idx3-ubyte is truncated or too long: expected 376 bytes .*, got 377"),
    ("header only", corrupt(I3, lambda b: b[:6]), "images-idx3-ubyte is truncated"),
    (
        "no bytes",
        corrupt(I3, lambda b: b""),
        "images-idx3-ubyte does not start like an IDX file .* 00000803",
    ),
    ("wrong magic", corrupt(I3, lambda b: b"PNG!" + b[4:]), "expected the magic number 00000803, got 504e4721"),
    ("labels as images", corrupt(I3, lambda b: idx(LABELS)), "expected the magic number 00000803, got 00000801"),
    ("floats", corrupt(L1, lambda b: b[:2] + b"\x0d" + b[3:]), "labels-idx1-ubyte .*magic number 00000801, got 00000d01"),
    ("no images", corrupt(I3, lambda b: idx(IMAGES[:0])), r"images-idx3-ubyte is empty: its sizes are \(0, 6, 5\)"),
    ("fewer labels", corrupt(L1, lambda b: idx(LABELS[:5])), "labels-idx1-ubyte has 5 labels for 12 images"),
    ("no labels", without_labels, r"images-idx3-ubyte has no labels: expected train-labels-idx1-ubyte\[.gz\] beside it"),
    ("half a gzip", corrupt(I3, lambda b: b[:40], ".gz"), "images-idx3-ubyte.gz is not a whole gzip file"),
    ("bad gzip", corrupt(I3, lambda b: b[:40] + bytes(30) + b[70:], ".gz"), "images-idx3-ubyte.gz is not a whole gzip file"),
    ("no gzip", corrupt(I3, lambda b: idx(IMAGES), ".gz"), "images-idx3-ubyte.gz is not a whole gzip file"),
    ("npz without images", npz(x=IMAGES), r"expected an array 'images' of uint8 .*, found {'x': \('uint8', \(12, 6, 5\)\)}"),
    ("npz of floats", npz(images=IMAGES / 255), "expected an array 'images' of uint8 .*'float64'"),
    ("npz of one image", npz(images=IMAGES[0]), r"expected an array 'images' .*\(6, 5\)"),
    ("npz empty", npz(images=IMAGES[:0]), r"expected an array 'images' .*\(0, 6, 5\)"),
    ("npz fewer labels", npz(images=IMAGES, labels=LABELS[:3]), r"expected 12 integer labels, found uint8 \(3,\)"),
    ("npz float labels", npz(images=IMAGES, labels=LABELS / 2), r"expected 12 integer labels, found float64 \(12,\)"),
    ("npz negative labels", npz(images=IMAGES, labels=LABELS.astype(int) - 1), "expected labels 0.*, found -1..8"),
    ("npz few names", npz(images=IMAGES, labels=LABELS, class_names=np.array(["a"])), "expected labels 0..0, found 0..9"),
    ("npz of objects", npz(images=np.array([{}], dtype=object)), "a.npz is not an NPZ file of plain arrays"),
    ("half an npz", damaged("b.npz", lambda b: b[:100]), "b.npz is not an NPZ file"),
    ("not an npz", damaged("b.npz", lambda b: b"hello"), "b.npz is not an NPZ file"),
    ("empty npz", damaged("b.npz", lambda b: b""), "b.npz is not an NPZ file"),
    ("an npy", array_file, "a.npy is not an NPZ file"),
    ("not a picture", not_a_picture, "a.png is not a readable picture"),
    *((f"half a {ending}", half_a_picture(ending), f"a.{ending} is not a readable picture") for ending in ("png", "jpg", "bmp")),
    ("stray picture", lambda p: write_pictures(p, ("a/b.png", "c.png")), "pictures beside its class folders, for example c.png"),
]


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_errors(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_images(path, image_size=None if path != tmp_path or any(tmp_path.glob("*ubyte*")) else 4)
    assert re.search(message, str(caught.value)), caught.value
    assert "data:" in str(caught.value)


def test_sizes_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: .* has images of \(6, 5\) pixels, expected 8 x 8"):
        load_images(write_idx(tmp_path / "i"), image_size=8)
    with pytest.raises(ValueError, match="image_size: expected a size for the pictures in .*, got None"):
        load_images(write_pictures(tmp_path / "p", ("a.png",)))
    with pytest.raises(ValueError, match="image_size: expected 1 <= image_size .*, got 0"):
        load_images(tmp_path / "p", image_size=0)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        load_images(tmp_path, "val")
