"""Images to train on: IDX files (MNIST and its kin), NPZ archives, folders of pictures."""

import gzip
import json
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bldm_kernels import checks

CAPTIONS = "captions.json"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
# IDX files hold numbers only; these data sets are known by the name of their folder, or of the one above it.
KNOWN_CLASSES = {
    "fashionmnist": ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    "mnist": [str(digit) for digit in range(10)],
}
IDX_SPLITS = {"train": "train", "test": "t10k"}


@dataclass
class ImageData:
    """Images uint8 (N, C, H, W), labels int64 (N,) or None, the classes' names if they are known, captions of each image."""

    images: Tensor
    labels: Tensor | None = None
    class_names: list[str] | None = None
    captions: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "ImageData":
        """The first so many images, with what belongs to them."""
        labels = None if self.labels is None else self.labels[:count]
        captions = None if self.captions is None else self.captions[:count]
        return ImageData(self.images[:count], labels, self.class_names, captions)

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 (stop - start, C, H, W)."""
        return self.images[start:stop]


@dataclass
class PictureFolder:
    """Like `ImageData`, but every picture is read when it is asked for: uint8 (3, image_size, image_size)."""

    files: list[Path]
    image_size: int
    labels: Tensor | None = None
    class_names: list[str] | None = None
    captions: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 (stop - start, 3, image_size, image_size), read by several threads."""
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda file: load_picture(file, self.image_size), self.files[start:stop])))


def load_images(path: str | Path, split: str = "train", image_size: int | None = None) -> ImageData:
    """Load a whole data set into memory: `open_images`, and all pictures of a folder read."""
    data = open_images(path, split, image_size)
    if isinstance(data, ImageData):
        return data
    return ImageData(data.read(0, len(data)), data.labels, data.class_names, data.captions)


def open_images(path: str | Path, split: str = "train", image_size: int | None = None) -> ImageData | PictureFolder:
    """Open a data set: a folder of pictures is only listed, anything else is in memory.

    Args:
        path: a folder with IDX files (train-images-idx3-ubyte[.gz] and so on, images and labels), an NPZ file with `images`
            uint8 (N, H, W[, C]), and `labels` and `class_names` if there are any (or split by split: train_images, ...),
            or a picture, or a folder of them, a subfolder being a class (below train/ and test/ folders if there are any), or,
            with a file captions.json beside them, {"file name": {"captions": [text, ...]}, ...}, each with its captions.
        split: "train" or "test".
        image_size: pictures are cropped to a square and resized to it; other data must have this size already.

    Raises: FileNotFoundError, ValueError naming the file and what was expected.
    """
    path = Path(path)
    if split not in IDX_SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if image_size is not None:
        checks.integer("image_size", image_size, 1, 2**16)
    if not path.exists():
        raise FileNotFoundError(f"data: no file or folder {path}")
    if path.is_file() and path.suffix.lower() in PICTURES and image_size is not None:
        return PictureFolder([path], image_size)
    if path.is_file():
        data = _load_npz(path, split)
    elif (idx := _find_idx(path, split, "images")) is not None:
        data = _load_idx(path, idx, split)
    else:
        return _open_folder(path, split, image_size)
    if image_size is not None and tuple(data.images.shape[2:]) != (image_size, image_size):
        raise ValueError(
            f"data: {path} has images of {tuple(data.images.shape[2:])} pixels, expected {image_size} x {image_size}"
        )
    return data


def _find_idx(folder: Path, split: str, what: str) -> Path | None:
    names = [f"{IDX_SPLITS[split]}-{what}-idx{3 if what == 'images' else 1}-ubyte{ending}" for ending in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of unsigned bytes in `ndim` dimensions: magic 0 0 8 ndim, big-endian sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} is not a whole gzip file: {error}") from None
    if raw[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(
            f"data: {path} does not start like an IDX file of unsigned bytes in {ndim} dimensions: expected the magic number "
            f"0000080{ndim}, got {raw[:4].hex()}"
        )
    sizes = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim]) if len(raw) >= 4 + 4 * ndim else ()
    expected = 4 + 4 * ndim + int(np.prod(sizes, dtype=np.int64))
    if not sizes or len(raw) != expected:
        raise ValueError(f"data: {path} is truncated or too long: expected {expected} bytes for sizes {sizes}, got {len(raw)}")
    if 0 in sizes:
        raise ValueError(f"data: {path} is empty: its sizes are {sizes}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(sizes)


def _load_idx(folder: Path, images_file: Path, split: str) -> ImageData:
    labels_file = _find_idx(folder, split, "labels")
    if labels_file is None:
        expected = f"{IDX_SPLITS[split]}-labels-idx1-ubyte[.gz]"
        raise FileNotFoundError(f"data: {images_file} has no labels: expected {expected} beside it")
    images = torch.from_numpy(read_idx(images_file, 3).copy()).unsqueeze(1)
    labels = torch.from_numpy(read_idx(labels_file, 1).astype(np.int64))
    if len(labels) != len(images):
        raise ValueError(f"data: {labels_file} has {len(labels)} labels for {len(images)} images")
    return ImageData(images, labels, _known_classes(folder) if int(labels.max()) < 10 else None)


def _known_classes(folder: Path) -> list[str] | None:
    parts = ("".join(filter(str.isalnum, part.lower())) for part in folder.resolve().parts[-2:])
    return next((KNOWN_CLASSES[part] for part in parts if part in KNOWN_CLASSES), None)


def _load_npz(path: Path, split: str) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data: {path} is not an NPZ file of plain arrays: {error}") from None
    images = arrays.get(f"{split}_images", arrays.get("images"))
    labels = arrays.get(f"{split}_labels", arrays.get("labels"))
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        found = {name: (a.dtype.name, a.shape) for name, a in arrays.items()}
        raise ValueError(f"data: {path}: expected an array 'images' of uint8 (N, H, W) or (N, H, W, C), found {found}")
    names = arrays.get("class_names")
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"data: {path}: expected {len(images)} integer labels, found {labels.dtype.name} {labels.shape}")
        high = 2**31 if names is None else len(names)
        if labels.min() < 0 or labels.max() >= high:
            raise ValueError(f"data: {path}: expected labels 0..{high - 1}, found {labels.min()}..{labels.max()}")
    x = torch.from_numpy(images)
    x = x.unsqueeze(1) if x.dim() == 3 else x.movedim(-1, 1).contiguous()
    return ImageData(
        x,
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        None if names is None or labels is None else [str(name) for name in names],
    )


def split_folder(path: Path, split: str) -> Path:
    """Where the pictures of a split are: in its own folder if there are such, else in `path`."""
    return path / split if any((path / name).is_dir() for name in IDX_SPLITS) else path


def read_captions(folder: Path) -> dict[str, list[str]]:
    """File name -> captions, from the folder's captions.json."""
    path = folder / CAPTIONS
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        captions = {name: [str(text) for text in about["captions"]] for name, about in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = '{"file name": {"captions": [text, ...]}, ...}'
        raise ValueError(f"data: {path}: expected {expected}: {type(error).__name__}: {error}") from None
    if not captions or not all(captions.values()):
        raise ValueError(f"data: {path}: expected pictures with one caption at least each")
    return captions


def _open_captioned(root: Path, image_size: int | None) -> PictureFolder:
    captions = read_captions(root)
    if image_size is None:
        raise ValueError(f"image_size: expected a size for the pictures in {root}, got None")
    return PictureFolder([root / name for name in captions], image_size, captions=list(captions.values()))


def _open_folder(path: Path, split: str, image_size: int | None) -> PictureFolder:
    root = split_folder(path, split)
    if (root / CAPTIONS).is_file():
        return _open_captioned(root, image_size)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in PICTURES)
    if not files:
        expected = "IDX files, or pictures (" + ", ".join(sorted(PICTURES)) + ")"
        raise ValueError(f"data: {root} holds no {expected}")
    if image_size is None:
        raise ValueError(f"image_size: expected a size for the pictures in {root}, got None")
    parents = [f.parent.relative_to(root).parts for f in files]
    if not any(parents):
        return PictureFolder(files, image_size)
    if not all(parents):
        raise ValueError(f"data: {root} has pictures beside its class folders, for example {files[parents.index(())].name}")
    names = sorted({parts[0] for parts in parents})
    number = {name: i for i, name in enumerate(names)}
    return PictureFolder(files, image_size, torch.tensor([number[parts[0]] for parts in parents]), names)


def load_picture(path: Path, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """uint8 (3, size, size): the middle square, resized."""
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data: {path} is not a readable picture: {error}") from None
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    # Cropped first: resizing from a box would blend in the pixels around it.
    rgb = rgb.crop((left, top, left + side, top + side)).resize((size, size), resampling)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
