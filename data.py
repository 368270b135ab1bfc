"""
Images, and their split into what the method may see.

    data = load("mnist")                                     # uint8 images and labels
    u, s, _ = pu_split(data, parse_classes("mnist", "odd"), prior=0.5, n_unlabeled=50000, n_labeled=2500)
    U, S = data.train[u], data.train[s]                      # unlabeled: half of it odd digits; labeled: all odd

`load` knows the labels because a data set to experiment with has them; a model is trained on U and S alone.
"""
import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

DATA_DIR = Path(__file__).parent / "data"

DATASETS = {
    "mnist": dict(
        classes=[str(digit) for digit in range(10)],
        groups={"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]},
        sensitive="odd",       # what must not be generated, unless told otherwise
        n_normal=25000,        # normal images in U
        n_labeled=2500,        # images in S; these three as in the paper, section 5
    ),
}

MNIST_SHA256 = {    # of the decompressed files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass
class Images:
    train: torch.Tensor           # [N, C, H, W] uint8
    train_labels: torch.Tensor    # [N] int64
    test: torch.Tensor
    test_labels: torch.Tensor


def load(name: str, data_dir: Path = DATA_DIR) -> Images:
    """The whole data set as uint8 tensors. Raises ValueError for an unknown name, OSError for a file that is
    missing or is not, byte for byte, what it should be."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    arrays = [read_idx(Path(data_dir) / name / f"{stem}.gz", sha256) for stem, sha256 in MNIST_SHA256.items()]
    x, y, x_test, y_test = map(torch.from_numpy, arrays)
    return Images(x[:, None], y.long(), x_test[:, None], y_test.long())


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """A gzipped IDX file of bytes (LeCun's format: 0, 0, type 8, number of dimensions, each dimension as a big-endian
    int32, then the bytes) -> uint8 array. sha256: of the decompressed file. Raises OSError naming the file."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: restore it from the repository, or point --data_dir to the folder "
                                f"that holds {path.parent.name}/") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise OSError(f"{path} is damaged ({e}): restore it from the repository") from None
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise OSError(f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex(' ')}, not 00 00 08")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    header = 4 + 4 * raw[3]
    if len(raw) != header + math.prod(shape.tolist()):
        raise OSError(f"{path} has the wrong size: its header promises {math.prod(shape.tolist())} bytes of data, "
                      f"found {len(raw) - header}")
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise OSError(f"{path} has been altered: expected SHA-256 {sha256}, found {found}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def parse_classes(name: str, text: str) -> list:
    """"odd", "1,3,5" or "even,1" -> class numbers, sorted. Names of groups and classes, or numbers, with commas.
    Raises ValueError for a class that does not exist, or where no class or every class is meant."""
    info, chosen = DATASETS[name], set()
    for word in text.split(","):
        word = word.strip().lower()
        if word in info["groups"]:
            chosen |= set(info["groups"][word])
        elif word in info["classes"]:
            chosen.add(info["classes"].index(word))
        elif word.isdecimal() and int(word) < len(info["classes"]):
            chosen.add(int(word))
        else:
            raise ValueError(f"{name} has no class {word!r}: choose among {', '.join([*info['groups'], *info['classes']])}")
    if len(chosen) == len(info["classes"]):
        raise ValueError(f"every class of {name} is sensitive: leave at least one to be generated")
    return sorted(chosen)


def pu_split(data: Images, sensitive: list, prior: float, n_unlabeled: int, n_labeled: int, seed: int = 0) -> tuple:
    """Which images are U, S and the test normals: int64 index vectors into data.train, data.train and data.test.

    U has n_unlabeled images, of which round(prior * n_unlabeled) are of the sensitive classes; S has n_labeled, all
    of the sensitive classes and none of them in U; both are in random order, drawn by the seed. The test normals are
    all test images of the other classes. Raises ValueError, with the largest size that works, for too few images."""
    is_sensitive = torch.isin(data.train_labels, torch.tensor(sensitive))
    n_pos, n_neg = int(is_sensitive.sum()), int((~is_sensitive).sum())

    def fits(n):    # U of n images: enough sensitive ones beside those for S, and enough normal ones?
        return round(prior * n) <= n_pos - n_labeled and n - round(prior * n) <= n_neg

    if not 0 < n_labeled < n_pos:
        raise ValueError(f"n_labeled = {n_labeled:,} is not possible: there are {n_pos:,} sensitive images, "
                         f"and U needs some of them too")
    if not fits(n_unlabeled):
        largest = math.ceil(min((n_pos - n_labeled + 0.5) / prior, (n_neg + 0.5) / (1 - prior)))
        while not fits(largest):
            largest -= 1
        raise ValueError(f"{n_unlabeled:,} unlabeled images at prior {prior:.4g} and {n_labeled:,} labeled ones are more "
                         f"than the {n_pos:,} sensitive and {n_neg:,} normal images allow: "
                         f"use n_unlabeled of at most {largest:,}, or another prior")
    n_hidden = round(prior * n_unlabeled)    # the sensitive images in U
    if not 0 < n_hidden < n_unlabeled:
        raise ValueError(f"{n_unlabeled:,} unlabeled images at prior {prior:.4g} do not hold one sensitive and one normal "
                         f"image: use a larger n_unlabeled")

    generator = torch.Generator().manual_seed(seed)
    def shuffle(index):
        return index[torch.randperm(len(index), generator=generator)]
    positives, negatives = shuffle(is_sensitive.nonzero()[:, 0]), shuffle((~is_sensitive).nonzero()[:, 0])
    u = shuffle(torch.cat([positives[:n_hidden], negatives[:n_unlabeled - n_hidden]]))
    test_normal = (~torch.isin(data.test_labels, torch.tensor(sensitive))).nonzero()[:, 0]
    return u, positives[n_hidden:n_hidden + n_labeled], test_normal


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded: the inverse of x / 127.5 - 1."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(image: torch.Tensor, path: Path):
    """image [C, H, W] uint8, one channel or three -> a PNG file."""
    pixels = rearrange(image.cpu().numpy(), "c h w -> h w c")
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path, format="PNG")


def save_grid(images: torch.Tensor, path: Path):
    """images [N, C, H, W] uint8 -> one PNG of about as many rows as columns, a pixel of white between the images."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tiles = torch.nn.functional.pad(images.cpu(), (0, 1, 0, 1), value=255)
    blank = torch.full_like(tiles[:1], 255).expand(rows * columns - len(images), -1, -1, -1)
    save_png(rearrange(torch.cat([tiles, blank]), "(r c) ch h w -> ch (r h) (c w)", r=rows)[:, :-1, :-1], path)
