"""
Bytes to arrays: IDX files, CIFAR-10, STL-10, CelebA, a folder of images with its cache, and downloads.
"""
import gzip
import hashlib
import http.client
import math
import os
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

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

# -----------------------------------------------------------------------------
# published formats

def load_idx(name: str, folder: Path) -> tuple:
    """"mnist" or "fashion_mnist", of which the latter is downloaded where it is not there yet
    -> train images [N, 1, 28, 28] uint8, train labels [N] int64, test images, test labels."""
    arrays = []
    for stem, sha256 in zip(IDX_FILES, IDX_SHA256[name]):
        path = folder / f"{stem}.gz"
        if name == "fashion_mnist" and not path.exists():
            fetch([url + path.name for url in FASHION_URLS], path, lambda part: read_idx(part, sha256))
        arrays.append(torch.from_numpy(read_idx(path, sha256)))
    return arrays[0][:, None], arrays[1].long(), arrays[2][:, None], arrays[3].long()


def load_records(name: str, folder: Path) -> tuple:
    """"cifar10" or "stl10", downloaded where they are not there yet -> as load_idx."""
    top, md5, urls = ARCHIVES[name]
    if not (folder / top).exists():
        fetch_archive(urls, folder, top, md5)
    x, y, x_test, y_test = map(torch.from_numpy, (read_cifar10 if name == "cifar10" else read_stl10)(folder / top))
    return x, y.long(), x_test, y_test.long()


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


def load_celeba(folder: Path, image_size: int, channels: int) -> tuple:
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
    return images[:n], labels[:n], images[n:], labels[n:]


# -----------------------------------------------------------------------------
# your own images

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
LAYOUT = """
  {0}/unlabeled/...      images of every kind, normal and sensitive
  {0}/sensitive/...      a few that must not be generated
  {0}/normal_test/...    (optional) normal images to compare with
in any subfolders, as PNG, JPEG, WebP, BMP or GIF"""


def load_folder(folder: Path, image_size: int, channels: int) -> tuple:
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
    return images[:n], labels[:n], images[n:], torch.zeros(len(labels) - n, dtype=torch.int64)


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
