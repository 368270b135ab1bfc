"""
Files to arrays: IDX, CIFAR-10, STL-10, CelebA, a folder of images, and downloads.

Each `load_*` returns training images, their labels, test images and their labels, in this order.
Images are uint8 tensors [N, C, H, W]. Files that are missing or damaged raise OSError.
"""
import glob
import gzip
import hashlib
import os
import re
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from files import regular, remove_stale, write_whole
from runtime import ranks

IDX_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
IDX_SHA256 = {    # of these four files, decompressed
    "mnist": [
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"],
    "fashion_mnist": [
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"],
}
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"]
ARCHIVES = {    # the binary versions: no pickle is loaded
    "cifar10": dict(urls=["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
                    md5="c32a1d4ab5d03f1284b67883e8d87530", top="cifar-10-batches-bin"),
    "stl10": dict(urls=["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"],
                  md5="91f7769df0f17e558f3565bffb0c7dfb", top="stl10_binary"),
}
CELEBA_ATTRIBUTES = """
    5_o_clock_shadow arched_eyebrows attractive bags_under_eyes bald bangs big_lips big_nose
    black_hair blond_hair blurry brown_hair bushy_eyebrows chubby double_chin eyeglasses goatee
    gray_hair heavy_makeup high_cheekbones male mouth_slightly_open mustache narrow_eyes no_beard
    oval_face pale_skin pointy_nose receding_hairline rosy_cheeks sideburns smiling straight_hair
    wavy_hair wearing_earrings wearing_hat wearing_lipstick wearing_necklace wearing_necktie young
""".split()
TIMEOUT = 30    # seconds without a byte after which a download is given up

# -----------------------------------------------------------------------------
# published data sets

def load_idx(name: str, folder: Path) -> tuple:
    """Loads "mnist", or "fashion_mnist", which is downloaded the first time."""
    arrays = []
    for file_name, sha256 in zip(IDX_FILES, IDX_SHA256[name]):
        path = folder / f"{file_name}.gz"
        if name == "fashion_mnist" and not path.exists():
            fetch([url + path.name for url in FASHION_URLS], path, partial(read_idx, sha256=sha256))
        arrays.append(torch.from_numpy(read_idx(path, sha256)))
    x, y, x_test, y_test = arrays
    return x[:, None], y.long(), x_test[:, None], y_test.long()


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """Reads a gzipped IDX file, whose decompressed content must have this SHA-256.

    It holds 0, 0, 8 (for bytes), the number of dimensions, each of them as a big-endian int32,
    and the data."""
    try:
        with gzip.open(regular(path)) as file:
            raw = file.read(48_000_000)    # the longest of these files has 47,040,016 bytes
    except Exception as error:    # damaged archives raise anything
        state = "damaged" if path.exists() else "missing"
        raise OSError(f"{path} is {state} ({error}): restore it from the repository, or point "
                      f"--data_dir to the folder that holds {path.parent.name}/") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise OSError(f"{path} has been altered: expected SHA-256 {sha256}, found {found}")
    n_dims = raw[3]
    shape = np.frombuffer(raw, ">i4", count=n_dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(shape).copy()


def load_records(name: str, folder: Path) -> tuple:
    """Loads "cifar10" or "stl10", which are downloaded the first time."""
    archive = ARCHIVES[name]
    read = {"cifar10": read_cifar10, "stl10": read_stl10}[name]
    if not (folder / archive["top"]).exists():
        fetch_archive(folder, **archive)
    x, y, x_test, y_test = map(torch.from_numpy, read(folder / archive["top"]))
    if max(y.max(), y_test.max()) > 9:    # STL-10's 0, less 1, is the byte 255
        raise OSError(f"{folder} has labels that are not classes: delete it to download it again")
    return x, y.long(), x_test, y_test.long()


def read_cifar10(folder: Path) -> list:
    """Each record is a label, one byte, and an image of 3x32x32 bytes."""
    arrays = []
    for pattern in ["data_batch_*.bin", "test_batch.bin"]:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise OSError(f"{folder / pattern} is missing: delete the folder to download it again")
        records = np.concatenate([read_records(path, 1 + 3 * 32 * 32) for path in paths])
        arrays += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]]
    return arrays


def read_stl10(folder: Path) -> list:
    """Images are 3x96x96 bytes, column by column. Labels have their own files and start at 1."""
    arrays = []
    for part in ["train", "test"]:
        x = read_records(folder / f"{part}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96)
        y = read_records(folder / f"{part}_y.bin", 1)[:, 0]
        if len(x) != len(y):
            raise OSError(f"{folder} has {len(x)} {part} images but {len(y)} labels")
        arrays += [x.transpose(0, 1, 3, 2).copy(), y - 1]
    return arrays


def read_records(path: Path, size: int) -> np.ndarray:
    """Reads a file of records of `size` bytes each -> uint8 [N, size]."""
    raw = np.fromfile(regular(path), np.uint8)
    if len(raw) == 0 or len(raw) % size:
        raise OSError(f"{path} has the wrong size: {len(raw)} bytes are not records of {size}: "
                      f"delete {path.parent} to download it again")
    return raw.reshape(-1, size)


def load_celeba(folder: Path, image_size: int, channels: int) -> tuple:
    """Reads the published files, and resizes the squares at the centres of the images.

    Labels are bool [N, 80]: the 40 attributes, and behind them the negation of each."""
    attribute_list = folder / "list_attr_celeba.txt"
    partition_list = folder / "list_eval_partition.txt"
    root = folder / "img_align_celeba"
    if not root.exists() and root.with_suffix(".zip").exists():
        unpack(root.with_suffix(".zip"), folder, root.name)
    missing = [path.name for path in [attribute_list, partition_list, root] if not path.exists()]
    if missing:
        raise OSError(f"CelebA cannot be downloaded by a script: get {', '.join(missing)} from "
                      f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them in {folder}")
    try:
        names = np.loadtxt(regular(partition_list), str, usecols=0, ndmin=1)
        parts = np.loadtxt(partition_list, int, usecols=1, ndmin=1)
        rows = np.loadtxt(regular(attribute_list), str, skiprows=2, usecols=0, ndmin=1)
        values = np.loadtxt(attribute_list, int, skiprows=2, usecols=range(1, 41), ndmin=2)
        inside = all(re.fullmatch(r"\w[\w.-]*", name) for name in names)    # no / and no ..
        if not inside or rows.tolist() != names.tolist():
            raise ValueError(f"they name different images, or images outside {root.name}")
        if not {0, 2} <= set(parts.tolist()) <= {0, 1, 2} or (abs(values) != 1).any():
            raise ValueError("a part is not 0, 1 or 2, or an attribute not 1 or -1")
    except ValueError as error:
        raise OSError(f"the lists in {folder} are not CelebA's as published: {error}") from None
    train, test = np.flatnonzero(parts == 0), np.flatnonzero(parts == 2)    # 1: validation
    used = np.concatenate([train, test])
    images, index = decode_all([root / name for name in names[used]], image_size, channels, folder)
    has = torch.from_numpy(values[used] == 1)[index]    # [N, 40]
    labels = torch.cat([has, ~has], dim=1)
    n_train = int((index < len(train)).sum())
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


# -----------------------------------------------------------------------------
# your own images

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]    # EPS would start Ghostscript
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin"}
TURNS = dict(zip(range(2, 9), [0, 3, 1, 5, 4, 6, 2]))    # EXIF orientation -> Image.Transpose
LAYOUT = """
  {0}/unlabeled/...      images of every kind, normal and sensitive
  {0}/sensitive/...      a few that must not be generated
  {0}/normal_test/...    (optional) normal images to compare with
in any subfolders, as PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF"""


def load_folder(folder: Path, image_size: int, channels: int) -> tuple:
    """Loads unlabeled/ with label 0, sensitive/ with label 1, and normal_test/ for the test."""
    paths, labels, ignored = [], [], Counter()
    for label, part in enumerate(["unlabeled", "sensitive", "normal_test"]):
        for path in sorted((folder / part).rglob("*")):
            names = path.relative_to(folder / part).parts
            suffix = path.suffix.lower()
            if any(name.startswith(".") or name.lower() in LEFT_BEHIND for name in names):
                continue
            if suffix in SUFFIXES and path.is_file():
                paths.append(path)
                labels.append(label)
            elif path.is_dir() and path.is_symlink():    # it could lead in circles
                ignored["linked folder(s)"] += 1
            elif not path.is_dir():
                ignored[suffix if re.fullmatch(r"\.\w{1,8}", suffix) else "without suffix"] += 1
    if ignored and ranks()[0] == 0:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in ignored.most_common())
        print(f"ignored in {folder}: {kinds}", file=sys.stderr)
    labels = torch.tensor(labels)
    if 0 in labels and 1 in labels:
        images, index = decode_all(paths, image_size, channels, folder)
        labels = labels[index]    # without the files that were skipped
    for label, part in enumerate(["unlabeled", "sensitive"]):
        if label not in labels:
            raise OSError(f"{folder / part} holds no images. The layout is{LAYOUT.format(folder)}")
    n_train = int((labels < 2).sum())
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:] - 2


def decode(path: Path, image_size: int, channels: int) -> np.ndarray:
    """Reads an image in one of FORMATS -> uint8 [C, H, W]. Raises what Pillow raises.

    The image is turned upright by its EXIF tag, put on white where it is transparent, cropped to
    the square at its centre, and resized with antialiasing."""
    with Image.open(regular(path), formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:    # Pillow itself only warns
            raise Image.DecompressionBombError
        image.load()    # first, since this turns a TIFF, and deletes its tag
        turn = None
        with suppress(Exception):    # EXIF can be damaged where the pixels are not
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode == "F":
            raise ValueError    # floating-point numbers, in a range that nobody knows
        if image.mode.startswith("I"):    # 16 bits of grey
            pixels = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(pixels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def decode_all(paths: list, image_size: int, channels: int, folder: Path) -> tuple:
    """Decodes image files, and keeps the result in a file for the next time.

    Returns memory-mapped images, uint8 [N, C, H, W], and the index of each in `paths`. Files that
    cannot be decoded are named and skipped. Raises OSError if they are more than 1 %."""
    key = hashlib.sha256(b"2\n")    # the version of decode
    for path in paths:    # an image that changes gets another key
        stat = path.stat()
        key.update(os.fsencode(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n"))
    record = np.dtype([("index", "i8"), ("image", "u1", (channels, image_size, image_size))])
    cache = folder / f"decoded_{image_size}x{channels}.bin"
    if not intact(cache, key.digest()):    # it reads all of a file: once, if that one is good
        cache = cache_folder(folder) / cache.name
        if not intact(cache, key.digest()):
            write_whole(cache, partial(write_records, paths=paths, record=record, key=key.digest()))
    n = (cache.stat().st_size - len(key.digest()) - 4) // record.itemsize
    records = np.memmap(cache, record, mode="c", shape=n)    # copy on write: no tensor is read-only
    return torch.from_numpy(records["image"]), torch.from_numpy(records["index"].copy())


def intact(path: Path, key: bytes) -> bool:
    """Is there a file that ends with this key, and behind it the checksum of all before?"""
    with suppress(OSError, ValueError):    # ValueError: it is empty
        raw = np.memmap(regular(path), np.uint8, mode="r")
        end = raw[-len(key) - 4:].tobytes()
        return end[:-4] == key and end[-4:] == zlib.crc32(raw[:-len(end)]).to_bytes(4)
    return False


def cache_folder(folder: Path) -> Path:
    """-> the folder for decoded images: a data folder itself, or another where it is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            cache = folder
    except OSError:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "pu_diffusion" / hashlib.sha256(bytes(folder.resolve())).hexdigest()[:16]
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)    # the images may be private
        print(f"{folder} is read-only: its decoded images are kept in {cache}", file=sys.stderr)
    remove_stale(cache, "decoded_*.tmp")
    return cache


def write_records(file_path: Path, paths: list, record: np.dtype, key: bytes):
    """Decodes images on several cores and writes a record of each, then what intact looks for."""
    channels, image_size, _ = record["image"].shape
    checksum = 0

    def attempt(i):
        try:
            return np.array((i, decode(paths[i], image_size, channels)), record).tobytes()
        except Exception as error:    # Pillow's readers raise anything
            reason = type(error).__name__
            print(f"\rskipped: {str(paths[i])!r} cannot be decoded ({reason})", file=sys.stderr)
            return b""

    with file_path.open("wb") as file, ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for first in range(0, len(paths), 100):    # few at a time, to save memory
            batch = range(first, min(first + 100, len(paths)))
            for raw in pool.map(attempt, batch):    # Pillow releases the GIL
                file.write(raw)
                checksum = zlib.crc32(raw, checksum)
            n_decoded = file.tell() // record.itemsize
            n_skipped = batch.stop - n_decoded
            if n_skipped > 0.01 * len(paths):
                raise OSError(f"{n_skipped:,} of {len(paths):,} images cannot be decoded, "
                              f"more than 1 %: remove or replace the files named above")
            print(f"\rdecoded {n_decoded:,} of {len(paths):,} images", end="", file=sys.stderr)
        file.write(key + checksum.to_bytes(4))
    print(file=sys.stderr)


# -----------------------------------------------------------------------------
# downloads

def fetch(urls: list, path: Path, verify):
    """Downloads a file from the first url that serves it, whole or not at all.

    verify: a function of the downloaded file's path that raises OSError if its content is wrong.
    Raises OSError with what went wrong at each url."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, f"{glob.escape(path.name)}.*.tmp")
    failures = []
    for url in urls:
        try:
            return write_whole(path, partial(download, url=url, verify=verify))
        except ValueError as error:
            failures.append(f"{url}: {error}")
    raise OSError(f"{path.name} could not be downloaded ({'; '.join(failures)}): "
                  f"try again, or put that file at {path}")


class Redirect(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub gives for a large file, before it says where the file lies."""
    sha256 = None

    def redirect_request(self, request, file, code, message, headers, url):
        tag = headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64:    # a small file has another checksum, git's
            self.sha256 = tag
        return super().redirect_request(request, file, code, message, headers, url)


def download(path: Path, url: str, verify):
    """Raises ValueError with the reason if it fails."""
    redirect = Redirect()
    opener = urllib.request.build_opener(redirect)
    try:
        with opener.open(url, timeout=TIMEOUT) as response, path.open("wb") as file:
            if response.headers.get_content_type() == "text/html":
                raise OSError("a web page came instead: does this network ask for a login?")
            size = int(response.headers["Content-Length"] or 0)
            while block := response.read(2 ** 20):
                done = file.tell() + file.write(block)
                print(f"\r{url}: {done / 1e6:.0f} of {size / 1e6:.0f} MB", end="", file=sys.stderr)
        print(file=sys.stderr)
        if path.stat().st_size < size:
            raise OSError(f"the connection ended after {path.stat().st_size:,} of {size:,} bytes")
        if redirect.sha256:
            check_sum(path, "sha256", redirect.sha256)
        verify(path)
    except Exception as error:    # a server can make urllib raise anything
        raise ValueError(error) from None


def fetch_archive(folder: Path, urls: list, md5: str, top: str):
    """Downloads a .tar.gz, unless it is in `folder` already, and unpacks its folder `top`."""
    archive = folder / urls[0].rsplit("/", 1)[-1]
    if archive.exists():
        check_sum(archive, "md5", md5)
    else:
        fetch(urls, archive, partial(check_sum, kind="md5", expected=md5))
    unpack(archive, folder, top)
    archive.unlink()


def check_sum(path: Path, kind: str, expected: str):
    with regular(path).open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise OSError(f"{path} is not the published file: expected {kind.upper()} {expected}, "
                      f"found {found}; delete it to download it again")


def unpack(archive: Path, folder: Path, top: str):
    """Unpacks the folder `top` of a .zip or .tar.gz into `folder`, whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            if archive.suffix == ".zip":
                zipfile.ZipFile(regular(archive)).extractall(temporary)
            else:
                tarfile.open(archive).extractall(temporary, filter="data")    # nothing outside it
            os.replace(Path(temporary) / top, folder / top)
    except Exception as error:    # damaged archives raise anything
        raise OSError(f"{archive} cannot be unpacked ({error})") from None
