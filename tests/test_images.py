"""Scaling for every byte; PNGs, grids and frames, pixel by pixel."""
import numpy as np
import pytest
import torch
from PIL import Image

from images import (
    empty_png_folder,
    framed,
    numbered,
    save_grid,
    save_grids,
    save_png,
    to_float,
    to_uint8,
)


def test_scaling_and_back_for_every_byte():
    byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(byte), byte.float() / 127.5 - 1)
    assert torch.equal(to_uint8(to_float(byte)), byte)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "image")    # a PNG whatever its name
    with Image.open(tmp_path / "image") as opened:
        assert opened.format == "PNG"
        pixels = torch.from_numpy(np.array(opened)).reshape(5, 7, channels)
    assert torch.equal(pixels.permute(2, 0, 1), image)


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (7, 3, 3), (64, 8, 8), (12, 3, 4)])
def test_grid_places_every_image(tmp_path, n, rows, columns):
    images = torch.randint(255, (n, 1, 4, 6), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png")
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png")))
    assert grid.shape == (rows * 5 - 1, columns * 7 - 1)
    for i in range(rows * columns):
        tile = grid[i // columns * 5:, i % columns * 7:][:4, :6]
        assert torch.equal(tile, images[i, 0]) if i < n else (tile == 255).all()
    assert (grid[4::5] == 255).all() and (grid[:, 6::7] == 255).all()    # the lines between them


def test_grids_stand_side_by_side(tmp_path):
    groups = [torch.full((n, 1, 4, 4), value, dtype=torch.uint8) for n, value in [(1, 0), (4, 9)]]
    save_grids(groups, tmp_path / "grids.png")
    pixels = np.array(Image.open(tmp_path / "grids.png"))
    assert pixels.shape == (9, 4 + 12 + 9)
    assert (pixels[:4, :4] == 0).all() and (pixels[4:, :4] == 255).all()
    assert (pixels[:, 4:16] == 255).all() and (pixels[:4, 16:20] == 9).all()


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 256)])
def test_numbers_stand_above_the_images(channels, size):
    tiles = numbered(torch.full((12, channels, size, size), 7, dtype=torch.uint8))
    assert tiles.shape == (12, 3, 108, 96) and tiles.dtype == torch.uint8
    assert (tiles[:, :, 12:] == 7).all()
    strips = tiles[:, :, :12]
    assert len({strip.numpy().tobytes() for strip in strips}) == 12    # each another number
    dark = (strips < 128).flatten(1).sum(1)
    assert (dark >= 15).all() and (dark < 300).all()


@pytest.mark.parametrize("name", ["0.png", "0.PNG"])
def test_a_folder_with_pngs_is_refused(tmp_path, name):
    empty_png_folder(tmp_path / "a" / "b", "--out_dir")
    (tmp_path / "a" / "b" / name).touch()
    with pytest.raises(ValueError, match="--out_dir .* already holds PNGs.*name an empty folder"):
        empty_png_folder(tmp_path / "a" / "b", "--out_dir")


def test_red_frames_land_where_they_belong():
    images = torch.arange(3 * 4, dtype=torch.uint8).view(3, 1, 2, 2)
    out = framed(images, torch.tensor([True, False, True]))
    assert out.shape == (3, 3, 6, 6)
    assert torch.equal(out[:, :, 2:4, 2:4], images.expand(-1, 3, -1, -1))
    border = torch.ones(6, 6, dtype=torch.bool)
    border[2:4, 2:4] = False
    for image, colour in zip(out, [[255, 0, 0], [255, 255, 255], [255, 0, 0]]):
        expected = torch.tensor(colour, dtype=torch.uint8)[:, None].expand(3, 32)
        assert torch.equal(image[:, border], expected)
