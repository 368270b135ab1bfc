"""
Images, and their split into what the method may see.

    data = load("mnist")                                     # uint8 images and labels
    u, s, test = split("mnist", data, prior=0.5)             # U: half of it odd digits; S: 2,500 labeled odd digits
    U, S = data.train[u], data.train[s]

    python data.py --dataset cifar10 --preview cifar10.png   # look at your data first
    python data.py --dataset folder --data_dir my_images --image_size 64 --preview mine.png

`load` knows the labels because a data set to experiment with has them; a model is trained on U and S alone.
"""
import argparse
import gzip
import hashlib
import http.client
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

DATA_DIR = Path(__file__).parent / "data"

# classes: names, in the order of their numbers. groups: names for several of them. sensitive: what must not be
# generated, unless told otherwise. n_normal: normal images in U. n_labeled: images in S. As in the paper, section 5.
DATASETS = {
    "mnist": dict(
        classes=[str(digit) for digit in range(10)],
        groups={"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]},
        sensitive="odd", n_normal=25000, n_labeled=2500, model="tiny", batch_size=128, hflip=False),
    "fashion_mnist": dict(
        classes=["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
        groups={"clothes": [0, 1, 2, 3, 4, 6], "shoes_and_bags": [5, 7, 8, 9]},
        sensitive="shoes_and_bags", n_normal=20000, n_labeled=2000, model="tiny", batch_size=128, hflip=False),
    "cifar10": dict(
        classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        groups={"vehicles": [0, 1, 8, 9], "animals": [2, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=20000, n_labeled=2000, model="paper", batch_size=128, hflip=True),
    "stl10": dict(
        classes=["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
        groups={"vehicles": [0, 2, 8, 9], "animals": [1, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=2000, n_labeled=200, model="paper", batch_size=32, hflip=True),
    "celeba": dict(    # attributes, not classes: number i + 40 is "not attribute i"
        classes=[sign + name for sign in ("", "not_") for name in (
            "5_o_clock_shadow arched_eyebrows attractive bags_under_eyes bald bangs big_lips big_nose black_hair blond_hair "
            "blurry brown_hair bushy_eyebrows chubby double_chin eyeglasses goatee gray_hair heavy_makeup high_cheekbones "
            "male mouth_slightly_open mustache narrow_eyes no_beard oval_face pale_skin pointy_nose receding_hairline "
            "rosy_cheeks sideburns smiling straight_hair wavy_hair wearing_earrings wearing_hat wearing_lipstick "
            "wearing_necklace wearing_necktie young").split()],
        groups={"female": [60]},
        sensitive="female", n_normal=2000, n_labeled=200, image_size=256, channels=3, model="paper", batch_size=16, hflip=True),
    "folder": dict(    # --data_dir with unlabeled/ and sensitive/
        image_size=32, channels=3, model="paper", batch_size=128, hflip=True),
}

FITS = 2 ** 29    # bytes: U and S up to this size are kept on the device, larger ones are read from their file

IDX_SHA256 = {    # of the decompressed files: train images, train labels, test images, test labels
    "mnist": ["ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"],
    "fashion_mnist": ["c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                      "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                      "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                      "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"],
}
IDX_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]

ARCHIVES = {    # folder within the archive, MD5 of the archive, addresses; both are the binary versions: no pickle is loaded
    "cifar10": ("cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530",
                ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]),
    "stl10": ("stl10_binary", "91f7769df0f17e558f3565bffb0c7dfb",
              ["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"]),
}
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"]
TIMEOUT = 30    # seconds without a byte until a download is given up


@dataclass
class Images:
    train: torch.Tensor           # [N, C, H, W] uint8, perhaps memory-mapped
    train_labels: torch.Tensor    # [N] int64 class numbers, or [N, K] bool where an image has several
    test: torch.Tensor
    test_labels: torch.Tensor


def load(name: str, data_dir: Path = DATA_DIR, image_size: int = None, channels: int = None) -> Images:
    """The whole data set. Fashion-MNIST, CIFAR-10 and STL-10 are downloaded to data_dir where they are not there yet.
    image_size (pixels) and channels (1 or 3) are for "folder" (32 and 3 if not given) and "celeba" (256 and 3).
    Raises ValueError for an unknown name, OSError for a file that is missing or is not what it should be."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    folder = Path(data_dir) / name
    if name in ("folder", "celeba"):
        size = (image_size or DATASETS[name]["image_size"], channels or DATASETS[name]["channels"])
        return load_folder(Path(data_dir), *size) if name == "folder" else load_celeba(folder, *size)
    if image_size or channels:
        raise ValueError(f"image_size and channels are for folder and celeba: {name} has its own")
    if name in IDX_SHA256:
        arrays = []
        for stem, sha256 in zip(IDX_FILES, IDX_SHA256[name]):
            path = folder / f"{stem}.gz"
            if name == "fashion_mnist" and not path.exists():
                fetch([url + path.name for url in FASHION_URLS], path, lambda part: read_idx(part, sha256))
            arrays.append(read_idx(path, sha256))
        arrays[0], arrays[2] = arrays[0][:, None], arrays[2][:, None]
    else:
        top, md5, urls = ARCHIVES[name]
        if not (folder / top).exists():
            fetch_archive(urls, folder, top, md5)
        arrays = (read_cifar10 if name == "cifar10" else read_stl10)(folder / top)
    x, y, x_test, y_test = map(torch.from_numpy, arrays)
    return Images(x, y.long(), x_test, y_test.long())


# -----------------------------------------------------------------------------
# published formats

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
        raise OSError(f"{path} is damaged ({e}): restore it, or delete it to download it again") from None
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


def read_records(path: Path, size: int) -> np.ndarray:
    """A file of records of `size` bytes -> uint8 [N, size]. Raises OSError for another size of file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: delete {path.parent} to download it again")
    raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % size:
        raise OSError(f"{path} has the wrong size: {len(raw)} bytes are not a number of records of {size}: "
                      f"delete {path.parent} to download it again")
    return raw.reshape(-1, size)


def read_cifar10(folder: Path) -> list:
    """Records of a label and 3x32x32 bytes -> train images, train labels, test images, test labels."""
    train = [read_records(path, 3073) for path in sorted(folder.glob("data_batch_*.bin"))]
    if not train:
        raise FileNotFoundError(f"{folder} holds no data_batch_*.bin: delete it to download it again")
    parts = [np.concatenate(train), read_records(folder / "test_batch.bin", 3073)]
    return [array for part in parts for array in (part[:, 1:].reshape(-1, 3, 32, 32), part[:, 0])]


def read_stl10(folder: Path) -> list:
    """3x96x96 bytes an image, column by column, and labels from 1 -> as read_cifar10."""
    arrays = []
    for part in ["train", "test"]:
        x = read_records(folder / f"{part}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
        y = read_records(folder / f"{part}_y.bin", 1)[:, 0]
        if len(x) != len(y):
            raise OSError(f"{folder} has {len(x)} {part} images but {len(y)} labels: delete it to download it again")
        arrays += [x.copy(), y - 1]
    return arrays


def load_celeba(folder: Path, image_size: int, channels: int) -> Images:
    """img_align_celeba.zip or its folder, list_attr_celeba.txt and list_eval_partition.txt, as published; centre crop."""
    names = ["list_attr_celeba.txt", "list_eval_partition.txt"]
    root, stamp = folder / "img_align_celeba", ""
    if not root.exists():
        names.append("img_align_celeba.zip")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"CelebA cannot be fetched by a script: get {', '.join(missing)} from "
                                f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them into {folder}")
    try:
        if not root.exists():
            stat = (folder / names[-1]).stat()
            root, stamp = zipfile.Path(folder / names[-1], "img_align_celeba/"), f"{stat.st_size} {stat.st_mtime_ns}"
        partition = dict(line.split() for line in (folder / names[1]).read_text().splitlines() if line.strip())
        lines = (folder / names[0]).read_text().splitlines()[2:]    # below the count and the names of the attributes
        attributes = {line.split()[0]: [value == "1" for value in line.split()[1:]] for line in lines if line.strip()}
        if {len(row) for row in attributes.values()} != {40} or attributes.keys() != partition.keys():
            raise ValueError("the two lists do not agree")
    except (ValueError, zipfile.BadZipFile) as e:
        raise OSError(f"{folder} does not hold CelebA as published: {e}") from None
    files = [(file, part) for part in "02" for file in partition if partition[file] == part]    # 1 is for validation
    images, which = decode_all([root / file for file, _ in files], image_size, channels, folder, stamp)
    kept = [files[i] for i in which]
    has = torch.tensor([attributes[file] for file, _ in kept])
    labels, n = torch.cat([has, ~has], dim=1), sum(part == "0" for _, part in kept)
    return Images(images[:n], labels[:n], images[n:], labels[n:])


# -----------------------------------------------------------------------------
# your own images

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
LAYOUT = """
  {0}/unlabeled/...      images of every kind, normal and sensitive
  {0}/sensitive/...      a few that must not be generated
  {0}/normal_test/...    (optional) normal images to compare with
in any subfolders, as PNG, JPEG, WebP, BMP or GIF"""


def load_folder(folder: Path, image_size: int, channels: int) -> Images:
    """train_labels: 0 for the images in unlabeled/, 1 for those in sensitive/. Links to folders are not followed."""
    parts = [sorted(path for path in (folder / part).rglob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())
             for part in ["unlabeled", "sensitive", "normal_test"]]
    labels, images, which = torch.tensor([i for i, paths in enumerate(parts) for _ in paths]), [], []
    if parts[0] and parts[1]:
        images, which = decode_all([path for paths in parts for path in paths], image_size, channels, folder)
        labels = labels[which]
    for i, part in enumerate(["unlabeled", "sensitive"]):
        if not (labels == i).any():
            raise FileNotFoundError(f"{folder / part} holds no images. The layout is{LAYOUT.format(folder)}")
    n = int((labels < 2).sum())
    return Images(images[:n], labels[:n], images[n:], torch.zeros(len(labels) - n, dtype=torch.int64))


def decode(path, image_size: int, channels: int) -> np.ndarray:
    """Any image that Pillow reads -> uint8 [C, H, W]: turned upright by its EXIF, on white where it is transparent, its
    centre cropped to a square and resized with antialiasing. Raises what Pillow raises."""
    with path.open("rb") as file, Image.open(file) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:    # Pillow itself refuses twice that
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):    # 16 bits of grey
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def decode_all(paths: list, image_size: int, channels: int, folder: Path, stamp: str = "") -> tuple:
    """-> memory-mapped uint8 images [N, C, H, W], and which of the paths each of them is. Decoded on all cores the first
    time and kept in one .npy in the folder, under a name made from all names, sizes and times (of the zip, if `stamp`).
    Files that cannot be decoded are named and left out. Raises OSError if they are more than 1 %."""
    key = hashlib.sha256(f"{image_size} {channels} {stamp}".encode())
    for path in paths:
        stat = None if stamp else path.stat()
        key.update(os.fsencode(f"{str(path)[len(str(folder)):]} {stat and (stat.st_size, stat.st_mtime_ns)}\n"))
    cache = folder / f"decoded_{image_size}x{channels}_{key.hexdigest()[:16]}.npy"
    if not cache.exists():
        def attempt(i):
            try:
                return i, decode(paths[i], image_size, channels)
            except Exception as e:    # Pillow raises whatever its readers do
                print(f"\rskipped: {str(paths[i])!r} cannot be decoded ({type(e).__name__})", file=sys.stderr)

        part, which, start = cache.with_suffix(f".{os.getpid()}.tmp"), [], time.time()

        def write_header(n):    # numpy leaves room in it for any n
            shape = (n, channels, image_size, image_size)
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))

        try:
            with part.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:    # Pillow works without the GIL
                write_header(len(paths))
                for first in range(0, len(paths), 250):
                    done = min(first + 250, len(paths))
                    for i, image in filter(None, pool.map(attempt, range(first, done))):
                        file.write(image.tobytes())
                        which.append(i)
                    bad = done - len(which)
                    if bad > 0.01 * len(paths):
                        raise OSError(f"{bad:,} of {len(paths):,} images in {folder} cannot be decoded, more than 1 %: "
                                      f"remove or replace the files named above")
                    print(f"\rdecoding: {done:,} of {len(paths):,} images, {done / (time.time() - start):.0f} a second",
                          end="\n" if done == len(paths) else "", file=sys.stderr, flush=True)
                np.save(file, np.array(which))    # a second array, behind the images
                file.seek(0)
                write_header(len(which))
            os.replace(part, cache)
        finally:
            part.unlink(missing_ok=True)
        if bad:
            print(f"{bad:,} of {len(paths):,} images were skipped", file=sys.stderr)
    try:
        images = np.load(cache, mmap_mode="c")    # copy on write: torch has no read-only tensors
        with cache.open("rb") as file:
            file.seek(images.offset + images.nbytes)
            return torch.from_numpy(images), np.load(file)
    except (ValueError, EOFError) as e:
        raise OSError(f"{cache} is damaged ({e}): delete it, and the images will be decoded again") from None


# -----------------------------------------------------------------------------
# downloads

def fetch(urls: list, path: Path, verify):
    """Downloads path from the first url that serves it whole: under a temporary name, verified, then renamed.
    verify(part): raises OSError if that file is not what it should be. Raises OSError with what each url said."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, said = path.with_name(f"{path.name}.{os.getpid()}.tmp"), []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, part.open("wb") as file:
                size, done, start = int(response.headers["Content-Length"] or 0), 0, time.time()
                while block := response.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    print(f"\r{path.name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB, {done / 1e6 / (time.time() - start):.1f} MB/s",
                          end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            if done < size:
                raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
            verify(part)
            os.replace(part, path)
            return
        except (OSError, ValueError, http.client.HTTPException) as e:
            said.append(f"{url}: {e}")
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"{path.name} could not be downloaded ({'; '.join(said)}): try again, or put that file at {path}")


def check_md5(path: Path, md5: str):
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise OSError(f"{path} is not the published file: expected MD5 {md5}, found {found}; delete it to download it again")


def fetch_archive(urls: list, folder: Path, top: str, md5: str):
    """Downloads a .tar.gz and leaves its folder `top` in `folder`, whole or not at all."""
    archive = folder / urls[0].rsplit("/", 1)[-1]
    if archive.exists():
        check_md5(archive, md5)
    else:
        fetch(urls, archive, lambda part: check_md5(part, md5))
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary, tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")    # nothing outside the folder, no links out of it, no devices
            os.replace(Path(temporary) / top, folder / top)
    except (tarfile.TarError, EOFError, zlib.error, FileNotFoundError) as e:
        raise OSError(f"{archive} cannot be unpacked ({e})") from None
    archive.unlink(missing_ok=True)

# -----------------------------------------------------------------------------
# the split

def parse_classes(name: str, text: str) -> list:
    """"odd", "1,3,5" or "cat,dog" -> class numbers, sorted. Names of groups and classes, or numbers, with commas.
    Raises ValueError for a class that does not exist, or where every class is meant."""
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


def has_class(labels: torch.Tensor, classes: list) -> torch.Tensor:
    """labels [N] class numbers or [N, K] bool -> [N] bool: is the image of one of the classes?"""
    return torch.isin(labels, torch.tensor(classes)) if labels.ndim == 1 else labels[:, classes].any(1)


def pu_split(data: Images, sensitive: list, prior: float, n_unlabeled: int, n_labeled: int, seed: int = 0) -> tuple:
    """Which images are U, S and the test normals: int64 index vectors into data.train, data.train and data.test.

    U has n_unlabeled images, of which round(prior * n_unlabeled) are of the sensitive classes; S has n_labeled, all
    of the sensitive classes and none of them in U; both are in random order, drawn by the seed. The test normals are
    all test images of the other classes. Raises ValueError, with the largest size that works, for too few images."""
    is_sensitive = has_class(data.train_labels, sensitive)
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
    test_normal = (~has_class(data.test_labels, sensitive)).nonzero()[:, 0]
    return u, positives[n_hidden:n_hidden + n_labeled], test_normal


def split(name: str, data: Images, sensitive: str = None, prior: float = 0.5, n_unlabeled: int = None,
          n_labeled: int = None, seed: int = 0) -> tuple:
    """pu_split with the data set's own choice for what is not given. A folder comes split: its prior is a guess, and
    ValueError is raised for the rest."""
    if name == "folder":
        if sensitive or n_unlabeled or n_labeled:
            raise ValueError("--sensitive, --n_unlabeled and --n_labeled are for labeled data sets: a folder is split already")
        return (data.train_labels == 0).nonzero()[:, 0], (data.train_labels == 1).nonzero()[:, 0], torch.arange(len(data.test))
    info = DATASETS[name]
    return pu_split(data, parse_classes(name, sensitive or info["sensitive"]), prior,
                    n_unlabeled or round(info["n_normal"] / (1 - prior)), n_labeled or info["n_labeled"], seed)


def digest(images: torch.Tensor) -> str:
    """What tells these images from others; of very many, some are looked at."""
    return hashlib.sha256(images[::1 + images.numel() // FITS].numpy().tobytes()).hexdigest()


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


# -----------------------------------------------------------------------------
# look at your data first

def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take, for argparse."""
    if abs(int(text)) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} does not fit in 64 bits")
    return int(text)


def fraction(text: str) -> float:
    """"0.5" or "1/11" -> a number in (0, 1), for argparse."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 0.5 or 1/11")
    return value


def data_flags(parser):
    """Adds the flags that say what U and S are."""
    flag = parser.add_argument
    flag("--dataset", default="mnist", choices=list(DATASETS), help="(default: mnist)")
    flag("--data_dir", type=Path, default=DATA_DIR,
         help="folder that holds mnist/ and the others; for folder, the one with unlabeled/ and sensitive/ (default: data/ beside this file)")
    flag("--image_size", type=positive, help="pixels, for folder and celeba (default: 32 and 256)")
    flag("--channels", type=int, choices=[1, 3], help="grey or colour, for folder and celeba (default: 3)")
    flag("--sensitive", help="what must not be generated: classes or groups, with commas (default: the data set's; mnist: odd)")
    flag("--prior", type=fraction, default=0.5, help="fraction of sensitive images in U (default: 0.5)")
    flag("--n_unlabeled", type=positive, help="images in U (default: as many as hold the data set's normal ones; mnist: 25,000 normal)")
    flag("--n_labeled", type=positive, help="images in S, labeled sensitive (default: the data set's; mnist: 2,500)")
    flag("--seed", type=seed, default=0, help="of all that is drawn at random (default: 0)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python data.py [--flag value ...]")
    flag = parser.add_argument
    data_flags(parser)
    flag("--preview", type=Path, default=Path("preview.png"), help="PNG to write: images of U, then of S (default: preview.png)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("data.py: interrupted"))
    try:
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, test_normal = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled, args.n_labeled, args.seed)
        size = f"{tuple(data.train.shape[1:])}"
        print(f"{args.dataset}: {len(data.train):,} training images {size}; U has {len(u):,}, S has {len(s):,}; "
              f"{len(test_normal):,} normal test images")
        if args.dataset == "folder":
            print("the fraction of sensitive images in U is not known: --prior is your guess of it")
        else:
            chosen = parse_classes(args.dataset, args.sensitive or DATASETS[args.dataset]["sensitive"])
            hidden = int(has_class(data.train_labels[u], chosen).sum())
            print(f"sensitive: {', '.join(DATASETS[args.dataset]['classes'][i] for i in chosen)}; "
                  f"in U: {hidden:,}, which is {hidden / len(u):.4g} of it")
        some = torch.Generator().manual_seed(0)
        save_grids([data.train[index[torch.randperm(len(index), generator=some)[:64]]] for index in (u, s)], args.preview)
        print(f"{args.preview}: U on the left, S on the right")
    except ValueError as e:
        parser.error(e)
    except OSError as e:
        sys.exit(f"data.py: error: {e}")


if __name__ == "__main__":
    main()
