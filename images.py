"""
Images on their way in and out: uint8 and [-1, 1], PNG files, grids.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded: the inverse of to_float. Clips what lies outside."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pillow(image: torch.Tensor) -> Image.Image:
    """An image, uint8 [C, H, W] with 1 or 3 channels -> Pillow's form of it."""
    pixels = rearrange(image, "c h w -> h w c").numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def save_png(image: torch.Tensor, path: Path):
    """Writes an image, uint8 [C, H, W] with 1 or 3 channels, as a PNG file."""
    to_pillow(image).save(path, format="PNG")


def load_png(path: Path) -> torch.Tensor:
    """Reads what save_png wrote -> uint8 [C, H, W]."""
    with Image.open(path, formats=["PNG"]) as image:
        return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def grid(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> one image [C, rows * (H+1) - 1, columns * (W+1) - 1], all uint8.

    It has about as many rows as columns, with white lines of one pixel between them."""
    columns = math.ceil(math.sqrt(len(images)))
    n_blank = -len(images) % columns
    tiles = F.pad(images.cpu(), (0, 1, 0, 1, 0, 0, 0, n_blank), value=255)    # W, H, C, N
    return rearrange(tiles, "(r c) ch h w -> ch (r h) (c w)", c=columns)[:, :-1, :-1]


def side_by_side(images: list) -> torch.Tensor:
    """Images uint8 [C, H_i, W_i] -> one image, uint8 [C, max H_i, ...], with white between them."""
    height = max(image.shape[1] for image in images)
    padded = [F.pad(image, (0, 12, 0, height - image.shape[1]), value=255) for image in images]
    return torch.cat(padded, dim=2)[:, :, :-12]


def framed(images: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> [N, 3, H+4, W+4], all uint8, with frames of two pixels.

    Frames are red where `marked` [N] is true, and white elsewhere."""
    n, _, height, width = images.shape
    frames = torch.full((n, 3, height + 4, width + 4), 255, dtype=torch.uint8)
    frames[marked, 1:] = 0    # red: no green, no blue
    frames[:, :, 2:-2, 2:-2] = images
    return frames


def numbered(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> [N, 3, 108, 96], all uint8: resized to 96 pixels, each with its number
    above it, from 1."""
    tiles = []
    for number, image in enumerate(images, start=1):
        tile = to_pillow(image).convert("RGB").resize((96, 96))
        tile = ImageOps.expand(tile, (0, 12, 0, 0), "white")
        ImageDraw.Draw(tile).text((1, 0), str(number), "black")
        tiles.append(torch.from_numpy(np.array(tile)))
    return rearrange(torch.stack(tiles), "n h w c -> n c h w")
