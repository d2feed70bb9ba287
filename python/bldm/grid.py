"""Drawing: a labelled grid of images, written as a PNG."""

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bldm_kernels as bk

from .checkpoint import write_atomically


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw_grid(
    images: Tensor, captions: Sequence[str] | None = None, columns: int | None = None, min_side: int = 84
) -> Image.Image:
    """A grid of images (B, 1 or 3, H, W) in [-1, 1], each over its caption (or its beginning); small images are
    enlarged by whole factors."""
    bk.checks.floating("images", images)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images: expected (B >= 1, 1 or 3, H, W), got {tuple(images.shape)}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions: expected {len(images)}, got {len(captions)}")
    count, _, height, width = images.shape
    columns = math.isqrt(count - 1) + 1 if columns is None else bk.checks.integer("columns", columns, 1, 2**31 - 1)
    scale = max(1, -(-min_side // width))
    gap, line = 6, 16 if captions else 0
    cell_w, cell_h = width * scale + gap, height * scale + gap + line
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "white")
    font = ImageFont.load_default(size=12)
    pen = ImageDraw.Draw(sheet)
    pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    for i in range(count):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        picture = Image.fromarray(pixels[i]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        if captions:
            text = _fitting(captions[i], lambda words: pen.textlength(words, font=font) <= cell_w)
            pen.text((x + width * scale / 2, y + height * scale + 2), text, fill="black", font=font, anchor="ma")
    return sheet


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    """As much of the beginning of a text as fits, with dots for the rest."""
    if fits(text):
        return text
    return next((cut for end in range(len(text) - 1, 0, -1) if fits(cut := text[:end].rstrip() + "...")), "")


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(Path(path), lambda name: Path(name).write_bytes(buffer.getvalue()))
