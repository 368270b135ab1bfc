"""
Images on their way in and out: uint8 and [-1, 1], PNG files, grids.
"""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps

from files import write_whole


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded: the inverse of to_float. Clips what lies outside."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture(image: torch.Tensor) -> Image.Image:
    """An image, uint8 [C, H, W] with 1 or 3 channels -> Pillow's form of it."""
    pixels = rearrange(image.cpu(), "c h w -> h w c").numpy()    # einops by torch: no recompiling
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]    # Pillow's form of a grey image
    return Image.fromarray(pixels)


def save_png(image: torch.Tensor, path: Path, sync: bool = True):
    """Writes an image, uint8 [C, H, W] with 1 or 3 channels, as PNG whatever the path's suffix.
    sync: see files.write_whole"""
    write_whole(path, partial(picture(image).save, format="PNG"), sync=sync)


def empty_png_folder(folder: Path, flag: str):
    """Makes a folder for PNG files.

    Raises ValueError, which names the flag, if it holds some already."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.suffix.lower() == ".png" for path in folder.iterdir()):
        raise ValueError(f"{flag} {folder} already holds PNGs, which would mix with these: "
                         f"name an empty folder")


def grid(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> one image [C, rows * (H+1) - 1, columns * (W+1) - 1], all uint8.

    It has about as many rows as columns, with white lines of one pixel between them."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    n_blank = rows * columns - len(images)
    tiles = F.pad(images.cpu(), (0, 1, 0, 1), value=255)
    tiles = torch.cat([tiles, torch.full_like(tiles[:1], 255).expand(n_blank, -1, -1, -1)])
    return rearrange(tiles, "(r c) ch h w -> ch (r h) (c w)", r=rows)[:, :-1, :-1]


def save_grid(images: torch.Tensor, path: Path):
    """Writes a grid of images, uint8 [N, C, H, W], as PNG."""
    save_png(grid(images), path)


def save_grids(groups: list, path: Path):
    """Writes a grid of each group of images, uint8 [N, C, H, W], side by side, as one PNG."""
    grids = [grid(images) for images in groups]
    height = max(image.shape[1] for image in grids)
    padded = [F.pad(image, (0, 12, 0, height - image.shape[1]), value=255) for image in grids]
    save_png(torch.cat(padded, dim=2)[:, :, :-12], path)


def framed(images: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> [N, 3, H+4, W+4], all uint8, with frames of two pixels.

    Frames are red where `marked` [N] is true, and white elsewhere."""
    n, _, height, width = images.shape
    frames = torch.full((n, 3, height + 4, width + 4), 255, dtype=torch.uint8)
    frames[marked.cpu(), 1:] = 0    # red: no green, no blue
    frames[:, :, 2:-2, 2:-2] = images.cpu()
    return frames


def numbered(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] -> [N, 3, 108, 96], all uint8: resized to 96 pixels, each with its number
    above it, from 1."""
    tiles = []
    for number, image in enumerate(images, start=1):
        tile = picture(image).convert("RGB").resize((96, 96))
        tile = ImageOps.expand(tile, (0, 12, 0, 0), "white")
        ImageDraw.Draw(tile).text((1, 0), str(number), "black")
        tiles.append(torch.from_numpy(np.array(tile)))
    return rearrange(torch.stack(tiles), "n h w c -> n c h w")


def join_pngs(paths: list, path: Path):
    """Writes PNG files of the same size and kind side by side into one."""
    parts = [Image.open(part, formats=["PNG"]) for part in paths]
    width, height = parts[0].size
    joined = Image.new(parts[0].mode, (len(parts) * (width + 12) - 12, height), "white")
    for i, part in enumerate(parts):
        joined.paste(part, (i * (width + 12), 0))
    write_whole(path, partial(joined.save, format="PNG"))
