"""
Images on their way in and out: uint8 and [-1, 1], PNG files, grids.
"""
import math
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded: the inverse of x / 127.5 - 1."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(image: torch.Tensor, path: Path):
    """image [C, H, W] uint8, one channel or three -> a PNG file."""
    pixels = rearrange(image.cpu().numpy(), "c h w -> h w c")
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path, format="PNG")


def no_pngs(folder: Path, flag: str):
    """Makes a folder for PNGs. Raises ValueError where it holds some already, OSError where it cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.png")):
        raise ValueError(f"{flag} {folder} already holds PNGs, which would mix with these: name an empty folder")


def grid(images: torch.Tensor) -> torch.Tensor:
    """images [N, C, H, W] uint8 -> one image [C, ...] of about as many rows as columns, a pixel of white between them."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tiles = torch.nn.functional.pad(images.cpu(), (0, 1, 0, 1), value=255)
    blank = torch.full_like(tiles[:1], 255).expand(rows * columns - len(images), -1, -1, -1)
    return rearrange(torch.cat([tiles, blank]), "(r c) ch h w -> ch (r h) (c w)", r=rows)[:, :-1, :-1]


def save_grid(images: torch.Tensor, path: Path):
    """images [N, C, H, W] uint8 -> a PNG file of their grid."""
    save_png(grid(images), path)


def save_grids(groups: list, path: Path):
    """[[N, C, H, W] uint8, ...] -> a PNG file of their grids, side by side."""
    grids = [grid(images) for images in groups]
    height = max(g.shape[1] for g in grids)
    grids = [torch.nn.functional.pad(g, (0, 12, 0, height - g.shape[1]), value=255) for g in grids]
    save_png(torch.cat(grids, dim=2)[:, :, :-12], path)


def framed(images: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """images [N, C, H, W] uint8, marked [N] bool -> [N, 3, H+4, W+4]: with a border of two pixels, red where marked."""
    rgb = images.cpu().expand(-1, 3, -1, -1)
    white = torch.nn.functional.pad(rgb, (2, 2, 2, 2), value=255)
    red = torch.stack([torch.nn.functional.pad(rgb[:, i], (2, 2, 2, 2), value=value) for i, value in enumerate([255, 0, 0])], dim=1)
    return torch.where(marked.cpu()[:, None, None, None], red, white)


def join_pngs(paths: list, path: Path):
    """Writes PNG files of the same size and kind side by side into one."""
    pictures = [Image.open(part) for part in paths]
    width, height = pictures[0].size
    joined = Image.new(pictures[0].mode, (len(pictures) * (width + 12) - 12, height), "white")
    for i, picture in enumerate(pictures):
        joined.paste(picture, (i * (width + 12), 0))
    joined.save(path, format="PNG")
