"""Drawing grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bldm.grid import draw_grid, save_png, to_uint8
from PIL import Image


def test_to_uint8() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, -1 + 2 / 255])
    assert to_uint8(values).tolist() == [0, 255, 128, 0, 255, 1]
    assert to_uint8(values.half()).dtype == torch.uint8


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_in_its_cell_enlarged_by_whole_factors(channels: int) -> None:
    images = torch.rand(5, channels, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = pixels(draw_grid(images, columns=3, min_side=12))  # factor 2: cells of 12 x 8 and a gap of 6
    assert sheet.shape == (2 * (8 + 6) + 6, 3 * (12 + 6) + 6, 3)
    expected = to_uint8(images).expand(-1, 3, -1, -1).movedim(1, -1).numpy()
    for i in range(5):
        y, x = 6 + i // 3 * 14, 6 + i % 3 * 18
        cell = sheet[y : y + 8, x : x + 12]
        assert (cell == expected[i].repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[:6] == 255).all() and (sheet[20:, 42:] == 255).all(), "gaps and unused cells are white"


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (64, 8), (65, 9)])
def test_the_grid_is_about_square(count: int, columns: int) -> None:
    picture = draw_grid(torch.zeros(count, 1, 2, 2), min_side=1)
    assert picture.size == (columns * 8 + 6, -(-count // columns) * 8 + 6)


def test_captions_are_drawn_under_the_images() -> None:
    images = torch.ones(2, 1, 28, 28)
    plain, labelled = draw_grid(images), draw_grid(images, ["Bag", "Ankle boot"])
    assert labelled.width == plain.width and labelled.height > plain.height
    below = pixels(labelled)[6 + 84 :]
    assert (pixels(plain) == 255).all()
    for half in (below[:, : labelled.width // 2], below[:, labelled.width // 2 :]):
        assert (half < 128).any(), "each caption has ink"


def test_save_png(tmp_path: Path) -> None:
    picture = draw_grid(torch.zeros(1, 1, 2, 2))
    save_png(picture, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as saved:
        assert saved.format == "PNG" and (pixels(saved) == pixels(picture)).all()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["grid.png"]
