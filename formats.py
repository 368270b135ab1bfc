"""
Files to arrays: IDX, CIFAR-10, STL-10, CelebA, a folder of images, and downloads.

Each `load_*` returns training images, uint8 [N, C, H, W], their labels, test images and theirs.
Files that are missing or damaged raise UserError or OSError.
"""
import gzip
import hashlib
import os
import shutil
import socket
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from runtime import UserError, ranks, warn, write_whole

IDX_FILES = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
             "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
IDX_SHA256 = {    # of these four files, decompressed: the first 16 digits
    "mnist": "ba891046e6505d7a 65a50cbbf4e906d7 0fa7898d509279e4 ff7bcfd416de3373".split(),
    "fashion_mnist": "c59f468a2f672dc8 bad3541b69d91243 5b4141f0afbad91e 0402a96d92fd2663".split(),
}
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"]
ARCHIVES = {    # URLs, MD5, and the folder inside; the binary versions, which need no pickle
    "cifar10": (["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
                "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"),
    "stl10": (["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"],
              "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary"),
}
CELEBA_ATTRIBUTES = """
    5_o_clock_shadow arched_eyebrows attractive bags_under_eyes bald bangs big_lips big_nose
    black_hair blond_hair blurry brown_hair bushy_eyebrows chubby double_chin eyeglasses goatee
    gray_hair heavy_makeup high_cheekbones male mouth_slightly_open mustache narrow_eyes no_beard
    oval_face pale_skin pointy_nose receding_hairline rosy_cheeks sideburns smiling straight_hair
    wavy_hair wearing_earrings wearing_hat wearing_lipstick wearing_necklace wearing_necktie young
""".split()
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]    # EPS would start Ghostscript
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
JUNK_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin"}    # thumbnails, deleted images
LAYOUT = """
  {0}/unlabeled/...      images of every kind, normal and sensitive
  {0}/sensitive/...      a few that must not be generated
  {0}/normal_test/...    (optional) normal images to compare with
in any subfolders, as PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF"""

# -----------------------------------------------------------------------------
# published data sets

def load_idx(name: str, folder: Path) -> tuple:
    """Loads "mnist", or "fashion_mnist", which is downloaded the first time."""
    arrays = []
    for file_name, sha256 in zip(IDX_FILES, IDX_SHA256[name]):
        path = folder / file_name
        if name == "fashion_mnist" and not path.exists():
            fetch([url + file_name for url in FASHION_URLS], path, read_idx, sha256)
        arrays.append(torch.from_numpy(read_idx(path, sha256)))
    x, y, x_test, y_test = arrays
    return x[:, None], y.long(), x_test[:, None], y_test.long()


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """Reads a gzipped IDX file: 0, 0, 8 (for bytes), the number of dimensions, each of them as a
    big-endian int32, and the data. sha256: the first digits, or all, of its SHA-256."""
    raw = b""
    with suppress(Exception):    # it is missing, or damaged
        raw = gzip.decompress(path.read_bytes())
    if not hashlib.sha256(raw).hexdigest().startswith(sha256):
        raise UserError(f"{path} is missing, or not the published file: restore it (mnist), delete "
                        f"it (fashion_mnist), or give the --data_dir that holds such folders")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def load_records(name: str, folder: Path) -> tuple:
    """Loads "cifar10" or "stl10", which are downloaded the first time."""
    urls, md5, inside = ARCHIVES[name]
    archive, top = folder / urls[0].split("/")[-1], folder / inside
    if not top.exists():
        fetch(urls, archive, check_md5, md5)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:    # whole or not at all
            shutil.unpack_archive(archive, temporary)
            os.replace(Path(temporary, top.name), top)
        archive.unlink()
    arrays = []
    for part, pattern in [("train", "data_batch_*.bin"), ("test", "test_batch.bin")]:
        if name == "cifar10":    # records of a label and an image, in bytes
            record = np.dtype([("y", "u1"), ("x", "u1", (3, 32, 32))])
            batches = [np.fromfile(path, record) for path in sorted(top.glob(pattern))]
            x, y = (np.concatenate([batch[key] for batch in batches]) for key in "xy")
        else:    # images of 3x96x96 bytes, column by column; labels from 1 to 10
            x = np.fromfile(top / f"{part}_X.bin", np.uint8).reshape(-1, 3, 96, 96).swapaxes(2, 3)
            y = np.fromfile(top / f"{part}_y.bin", np.uint8) - 1
        arrays += [torch.tensor(x), torch.tensor(y).long()]
    return tuple(arrays)


def load_celeba(folder: Path, image_size: int, channels: int) -> tuple:
    """Resizes the squares at the centres of the published images.
    Labels are bool [N, 80]: the 40 attributes, then the negation of each."""
    root = folder / "img_align_celeba"
    attributes, partition = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    missing = [path.name for path in [attributes, partition, root] if not path.exists()]
    if missing:
        raise UserError(f"{folder} needs {', '.join(missing)}, unpacked: no script can download "
                        f"CelebA. It is at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html")
    try:
        names, parts = np.loadtxt(partition, str).T
        table = np.loadtxt(attributes, str, skiprows=2)    # a name, and 40 times 1 or -1
        matching = names.tolist() == table[:, 0].tolist()
    except (ValueError, IndexError):    # they are not tables
        matching = False
    if not matching:
        raise UserError(f"the two lists in {folder} are not CelebA's as published: get them again")
    train, test = np.flatnonzero(parts == "0"), np.flatnonzero(parts == "2")    # 1: validation
    used = np.concatenate([train, test])
    has = torch.from_numpy(table[used, 1:] == "1")    # [N, 40]
    return decode_all([root / name for name in names[used]], torch.cat([has, ~has], dim=1),
                      len(train), folder, image_size, channels)


def fetch(urls: list, path: Path, verify, checksum: str):
    """Downloads a file, unless it is there, from the first URL that serves it, whole or not at all.
    verify(path, checksum) must raise UserError for another file."""
    if path.exists():
        return verify(path, checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)    # seconds without a byte
    failures = []
    for url in urls:
        try:
            torch.hub.download_url_to_file(url, str(path))    # renames a temporary file
            return verify(path, checksum)
        except UserError:
            path.unlink()
            failures.append(f"{url}: another file came; does this network ask for a login?")
        except Exception as error:    # a server can make urllib raise anything
            failures.append(f"{url}: {error}")
    raise UserError(f"{path.name} could not be downloaded ({'; '.join(failures)}): "
                    f"try again, or put that file at {path}")


def check_md5(path: Path, md5: str):
    """Raises UserError for another file."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            raise UserError(f"{path} is not the published file: delete it to download it again")


# -----------------------------------------------------------------------------
# your own images

def load_folder(folder: Path, image_size: int, channels: int) -> tuple:
    """Loads unlabeled/ with label 0, sensitive/ with label 1, and normal_test/ for the test."""
    u, s, test = (image_files(folder / part) for part in ["unlabeled", "sensitive", "normal_test"])
    if not u or not s:
        empty = folder / ("sensitive" if u else "unlabeled")
        raise UserError(f"{empty} holds no images. The layout is{LAYOUT.format(folder)}")
    labels = torch.tensor([0] * len(u) + [1] * len(s) + [0] * len(test))
    return decode_all(u + s + test, labels, len(u) + len(s), folder, image_size, channels)


def image_files(folder: Path) -> list:
    """-> the paths of all images in a folder and its subfolders, sorted. Says on stderr what else
    is there, hidden files apart. Raises OSError for a folder that cannot be read."""
    paths, ignored, folders = [], Counter(), [folder] if folder.exists() else []
    while folders:
        for entry in os.scandir(folders.pop()):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in JUNK_FOLDERS:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_dir():    # it could lead in circles
                ignored["linked folder(s)"] += 1
            elif suffix in SUFFIXES:
                paths.append(Path(entry.path))
            else:
                ignored[suffix or "without suffix"] += 1
    if ignored and ranks()[0] == 0:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in ignored.most_common())
        warn(f"ignored in {folder}: {kinds}")
    return sorted(paths)


def decode(path: Path, image_size: int, channels: int) -> np.ndarray:
    """Reads an image in one of FORMATS -> uint8 [C, H, W]. Raises what Pillow raises.

    The image is turned upright by its EXIF tag, put on white where it is transparent, cropped to
    the square at its centre, and resized with antialiasing."""
    with Image.open(path, formats=FORMATS) as image:
        image.load()    # first, since this turns a TIFF, and deletes its tag
        with suppress(Exception):    # a damaged tag raises, but after the turn
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):    # 16 bits of grey
            pixels = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(pixels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def decode_each(paths: list, image_size: int, channels: int):
    """Yields the index of each path and its image, uint8 [C, H, W], decoded on several cores.
    Names files that cannot be decoded, and skips them. Raises UserError if they are over 1 %."""
    def attempt(path):
        try:
            return decode(path, image_size, channels)
        except Exception as error:    # Pillow's readers raise anything
            skipped.append(path)
            warn(f"\rskipped {str(path)!r}: {str(error) or type(error).__name__}")

    skipped, brightest = [], 0
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:    # Pillow releases the GIL
        for first in range(0, len(paths), 100):    # few at a time, to save memory
            for i, image in enumerate(pool.map(attempt, paths[first:first + 100]), first):
                if image is not None:
                    brightest = max(brightest, int(image.max()))
                    yield i, image
            if len(skipped) > 0.01 * len(paths):
                raise UserError(f"{len(skipped)} of {len(paths):,} images cannot be decoded, more "
                                f"than 1 %: remove or replace the files named above")
            warn(f"\rdecoded {i + 1 - len(skipped):,} of {len(paths):,} images", end="")
    warn()
    if brightest < 32:
        warn(f"nearly black: no pixel is above {brightest} of 255. Do 16-bit files hold 12 bits?")


def decode_all(paths: list, labels: torch.Tensor, n_train: int, folder: Path, image_size: int,
               channels: int) -> tuple:
    """Decodes images into a file in `folder`, once, and memory-maps it: it may exceed the memory.
    labels: of all paths, the first n_train of which are for training -> what a load_* returns"""
    state = [(p.relative_to(folder), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    name = f"decoded_{image_size}x{channels}"
    cache = folder / f"{name}_{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.npy"
    record = np.dtype([("index", "i8"), ("image", "u1", (channels, image_size, image_size))])
    decoded = decode_each(paths, image_size, channels)    # a generator: it decodes when it is read

    def write(file):    # the header twice: how many images there are is known at the end
        np.save(file, np.empty(0, record))
        n = sum(file.write(np.array(pair, record)) for pair in decoded) // record.itemsize
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, dict(descr=record.descr, fortran_order=False, shape=(n,)))

    if not cache.exists() and os.access(folder, os.W_OK):
        write_whole(cache, write)
        for older in set(folder.glob(f"{name}_*.npy")) - {cache}:
            older.unlink(missing_ok=True)
    if not cache.exists():
        warn(f"{folder} cannot be written: its images are decoded into memory, at every start")
    records = np.load(cache, mmap_mode="r") if cache.exists() else np.fromiter(decoded, record)
    with warnings.catch_warnings(action="ignore", category=UserWarning):    # it is read-only
        images = torch.from_numpy(records["image"])
    if len(images) < len(paths):
        index = records["index"].copy()
        labels, n_train = labels[index], (index < n_train).sum()
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]
