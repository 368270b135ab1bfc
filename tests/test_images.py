"""Scaling for every byte; PNGs, grids and frames, pixel by pixel."""
import pytest
import torch
from PIL import Image

from images import framed, grid, load_png, numbered, save_png, side_by_side, to_float, to_uint8


def random_images(*shape):
    return torch.randint(255, shape, dtype=torch.uint8)    # 255 is left for borders


def test_scaling_and_back_for_every_byte():
    byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(byte), byte.float() / 127.5 - 1)
    assert torch.equal(to_uint8(to_float(byte)), byte)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = random_images(channels, 5, 7)
    save_png(image, tmp_path / "image.png")
    assert torch.equal(load_png(tmp_path / "image.png"), image)
    with Image.open(tmp_path / "image.png") as opened:
        assert opened.format == "PNG" and opened.size == (7, 5)
        pixel = opened.getpixel((4, 2))    # x, y
    assert pixel == (image[0, 2, 4] if channels == 1 else tuple(image[:, 2, 4].tolist()))


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (7, 3, 3), (64, 8, 8), (12, 3, 4)])
def test_grid_places_every_image(n, rows, columns):
    images = random_images(n, 1, 4, 6)
    whole = grid(images)[0]
    assert whole.shape == (rows * 5 - 1, columns * 7 - 1)
    for i in range(rows * columns):
        tile = whole[i // columns * 5:, i % columns * 7:][:4, :6]
        assert torch.equal(tile, images[i, 0]) if i < n else (tile == 255).all()
    assert (whole[4::5] == 255).all() and (whole[:, 6::7] == 255).all()    # the lines between them


def test_pictures_stand_side_by_side_on_white():
    a, b = random_images(1, 4, 4), random_images(1, 9, 5)
    both = side_by_side([a, b])
    assert both.shape == (1, 9, 4 + 12 + 5)
    assert torch.equal(both[:, :4, :4], a) and torch.equal(both[:, :, 16:], b)
    assert (both[:, 4:, :4] == 255).all() and (both[:, :, 4:16] == 255).all()


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 256)])
def test_numbers_stand_above_the_images(channels, size):
    tiles = numbered(torch.full((12, channels, size, size), 7, dtype=torch.uint8))
    assert tiles.shape == (12, 3, 108, 96) and (tiles[:, :, 12:] == 7).all()
    strips = tiles[:, :, :12]
    assert len({strip.numpy().tobytes() for strip in strips}) == 12    # each another number
    dark = (strips < 128).flatten(1, 2).any(1).sum(1)    # columns
    assert 2 <= dark[:9].min() and dark[:9].max() < dark[9:].min()    # from 1 to 12


def test_red_frames_land_where_they_belong():
    images = random_images(3, 1, 2, 2)
    out = framed(images, torch.tensor([True, False, True]))
    assert out.shape == (3, 3, 6, 6)
    assert torch.equal(out[:, :, 2:4, 2:4], images.expand(-1, 3, -1, -1))
    out[:, :, 2:4, 2:4] = 255
    for image, red in zip(out, [True, False, True]):
        assert (image[0] == 255).all() and (image[1:, :2] == (0 if red else 255)).all()
        assert torch.equal(image, image.flip(1)) and torch.equal(image, image.transpose(1, 2))
