"""Data sets in their published layouts, byte by byte; a folder of images; hostile downloads."""
import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_folder, random_bytes, write_celeba, write_cifar10
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError, features

import formats
from data import DATA_DIR, has_class, load, parse_classes, split
from formats import decode, read_idx

REAL = Path(os.environ.get("PU_DATA", "no such folder"))    # holds fashion_mnist/ and cifar10/


@pytest.fixture
def impatient(tmp_path):
    """Fails a test that waits for a FIFO, after ten seconds in which nobody writes to it."""
    def end(*_):
        for path in tmp_path.rglob("*"):
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))    # sets a reader free
        pytest.fail("it waits for a FIFO")

    old = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# MNIST's files, whole and damaged

@pytest.fixture
def copy(tmp_path):
    shutil.copytree(DATA_DIR / "mnist", tmp_path / "mnist")
    return tmp_path


def test_a_missing_file_is_named(copy):
    (copy / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(OSError, match="t10k-labels-idx1-ubyte.gz is missing"):
        load("mnist", copy)


def test_a_truncated_archive_is_named(copy):
    path = copy / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(OSError, match="train-images-idx3-ubyte.gz is damaged"):
        load("mnist", copy)


@pytest.mark.parametrize("edit", [
    lambda raw: raw[:-1],
    lambda raw: raw + b"\0",
    lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:],
    lambda raw: b"\x89PNG" + raw[4:],
    lambda raw: b"",
])
def test_an_altered_file_is_refused(copy, edit):
    path = copy / "mnist" / "t10k-labels-idx1-ubyte.gz"
    raw = edit(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(raw))
    found = hashlib.sha256(raw).hexdigest()
    words = f"{path.name} has been altered: expected SHA-256 ff7bcfd4.*, found {found}"
    with pytest.raises(OSError, match=words):
        load("mnist", copy)


def test_a_file_that_is_not_gzip_is_refused(copy):
    (copy / "mnist" / "t10k-labels-idx1-ubyte.gz").write_text("<html>404</html>")
    with pytest.raises(OSError, match="t10k-labels-idx1-ubyte.gz is damaged"):
        load("mnist", copy)


def test_a_gzip_bomb_is_read_no_further_than_the_longest_file(tmp_path):
    """Behind 60 MB of zeros, the stream is damaged: who reads that far says so."""
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(60_000_000), 1) + b"damaged")
    with pytest.raises(OSError, match="bomb.gz has been altered"):
        read_idx(tmp_path / "bomb.gz", "another")


def test_a_fifo_in_place_of_a_published_file_is_not_waited_for(copy, impatient):
    write_cifar10(copy / "cifar10" / "cifar-10-batches-bin")
    write_celeba(copy / "celeba", as_zip=False)
    for name, file_name in [("mnist", "train-images-idx3-ubyte.gz"),
                            ("cifar10", "cifar-10-batches-bin/data_batch_1.bin"),
                            ("celeba", "list_attr_celeba.txt")]:
        (copy / name / file_name).unlink()
        os.mkfifo(copy / name / file_name)
        with pytest.raises(OSError, match=f"{file_name} is not a regular file"):
            load(name, copy)


def test_read_idx_round_trip(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    raw = b"\0\0\x08\x03" + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    assert np.array_equal(read_idx(tmp_path / "a.gz", hashlib.sha256(raw).hexdigest()), array)


# CIFAR-10 and STL-10: a pixel's place in the file is computed here from the published description

def test_cifar10_layout(tmp_path):
    write_cifar10(tmp_path / "cifar10" / "cifar-10-batches-bin")
    images = load("cifar10", tmp_path)
    assert images.train.shape == (10, 3, 32, 32)
    assert images.test.shape == (5, 3, 32, 32)
    raw = (tmp_path / "cifar10" / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()
    assert images.train_labels[5:].tolist() == [raw[3073 * i] for i in range(5)]
    for i, channel, row, column in [(0, 0, 0, 0), (3, 1, 7, 30), (4, 2, 31, 31)]:
        place = 3073 * i + 1 + 1024 * channel + 32 * row + column
        assert images.train[5 + i, channel, row, column] == raw[place]


def test_stl10_layout_is_column_by_column(tmp_path):
    folder = tmp_path / "stl10" / "stl10_binary"
    folder.mkdir(parents=True)
    for part, n in [("train", 3), ("test", 4)]:
        (folder / f"{part}_X.bin").write_bytes(random_bytes(n * 3 * 96 * 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 10, 5, 2][:n]))
    images = load("stl10", tmp_path)
    assert images.train.shape == (3, 3, 96, 96) and images.test_labels.tolist() == [0, 9, 4, 1]
    raw = (folder / "test_X.bin").read_bytes()
    for i, channel, row, column in [(0, 0, 0, 1), (2, 1, 7, 90), (3, 2, 95, 95)]:
        place = 27648 * i + 9216 * channel + 96 * column + row
        assert images.test[i, channel, row, column] == raw[place]
    for label in (0, 11):
        (folder / "train_y.bin").write_bytes(bytes([1, 2, label]))
        with pytest.raises(OSError, match="stl10 has labels that are not classes"):
            load("stl10", tmp_path)
    (folder / "train_y.bin").write_bytes(bytes([1, 2]))
    with pytest.raises(OSError, match="3 train images but 2 labels"):
        load("stl10", tmp_path)


def test_a_file_of_the_wrong_size_is_named(tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    write_cifar10(folder)
    (folder / "data_batch_1.bin").write_bytes(b"\0" * 3074)
    words = "data_batch_1.bin has the wrong size: 3074 bytes.*records of 3073"
    with pytest.raises(OSError, match=words):
        load("cifar10", tmp_path)
    (folder / "data_batch_1.bin").write_bytes(b"\x0a" + bytes(3072))    # of a class 10
    with pytest.raises(OSError, match="cifar10 has labels that are not classes"):
        load("cifar10", tmp_path)
    (folder / "test_batch.bin").unlink()
    (folder / "data_batch_1.bin").unlink()
    with pytest.raises(OSError, match="test_batch.bin is missing"):
        load("cifar10", tmp_path)


@pytest.mark.skipif(not (REAL / "fashion_mnist").exists(), reason="PU_DATA has no fashion_mnist/")
def test_real_fashion_mnist():
    fashion = load("fashion_mnist", REAL)
    assert fashion.train.shape == (60000, 1, 28, 28)
    assert fashion.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    u, s, test_normal = split("fashion_mnist", fashion)
    assert (len(u), len(s), len(test_normal)) == (40000, 2000, 6000)


@pytest.mark.skipif(not (REAL / "cifar10").exists(), reason="PU_DATA has no cifar10/")
def test_real_cifar10():
    cifar = load("cifar10", REAL)
    for labels in [cifar.train_labels, cifar.test_labels]:    # PU_DATA may hold a part of it
        assert labels.bincount().tolist() == [len(labels) // 10] * 10


# CelebA: three faces, and the real text formats

@pytest.mark.parametrize("as_zip", [False, True])
def test_celeba(tmp_path, as_zip):
    write_celeba(tmp_path / "celeba", as_zip)
    images = load("celeba", tmp_path, image_size=64)
    assert images.train.shape == images.test.shape == (1, 3, 64, 64)    # one is for validation
    red, green, blue = images.train[0].float()
    assert red[:, :28].mean() > 230 and blue[:, 36:].mean() > 230 and green[5:-5].mean() < 30
    male, female = parse_classes("celeba", "Male"), parse_classes("celeba", "female")
    assert has_class(images.train_labels, male).tolist() == [True]
    assert has_class(images.test_labels, male).tolist() == [True]
    assert has_class(images.train_labels, female).tolist() == [False]
    assert images.train_labels.shape == (1, 80)
    assert (images.train_labels[:, :40] ^ images.train_labels[:, 40:]).all()


def test_celeba_says_what_is_missing(tmp_path):
    write_celeba(tmp_path / "celeba", as_zip=True)
    (tmp_path / "celeba" / "list_eval_partition.txt").unlink()
    words = "get list_eval_partition.txt from https.*CelebA.html and put them in .*celeba"
    with pytest.raises(OSError, match=words):
        load("celeba", tmp_path)


@pytest.mark.parametrize("file_name, edit, words", [
    ("list_attr_celeba.txt", lambda raw: raw[:-30], "lists.*are not CelebA's as published"),
    ("list_eval_partition.txt", lambda raw: raw + b"000009.jpg 0", "lists.*are not CelebA's"),
    ("list_eval_partition.txt", lambda raw: raw.replace(b"g 1", b"g 7"), "a part is not 0, 1"),
    ("list_attr_celeba.txt", lambda raw: raw.replace(b" -1", b"  0", 1), "an attribute not 1"),
    ("list_attr_celeba.txt", lambda raw: raw.replace(b"03.jpg", b"04.jpg"), "different images"),
    ("img_align_celeba.zip", lambda raw: re.sub(    # a compression that nobody knows
        rb"(PK\x01\x02.{6})\0\0", rb"\1c\0", raw, flags=re.S), "cannot be unpacked"),
    ("img_align_celeba.zip", lambda raw: raw[:-30], "img_align_celeba.zip cannot be unpacked"),
])
def test_a_damaged_celeba_is_refused(tmp_path, file_name, edit, words):
    write_celeba(tmp_path / "celeba", as_zip=True)
    path = tmp_path / "celeba" / file_name
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(OSError, match=words):
        load("celeba", tmp_path, image_size=64)


@pytest.mark.parametrize("name", ["../secret.jpg", "..", "/etc/secret.jpg", "a/secret.jpg"])
def test_celeba_lists_stay_in_their_folder(tmp_path, name):
    write_celeba(tmp_path / "celeba", as_zip=False)
    (tmp_path / "celeba" / "img_align_celeba" / "000001.jpg").rename(
        tmp_path / "celeba" / "secret.jpg")
    for path in (tmp_path / "celeba").glob("list*.txt"):
        path.write_text(path.read_text().replace("000001.jpg", name))
    with pytest.raises(OSError, match="name different images, or images outside img_align_celeba"):
        load("celeba", tmp_path, image_size=64)


def test_a_fifo_among_celebas_images_is_a_broken_one(tmp_path, impatient, capsys):
    write_celeba(tmp_path / "celeba", as_zip=False)
    path = tmp_path / "celeba" / "img_align_celeba" / "000003.jpg"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="1 of 2 images cannot be decoded"):
        load("celeba", tmp_path, image_size=64)
    assert "000003.jpg' cannot be decoded (OSError)" in capsys.readouterr().err


# A folder of images

def test_decode_reads_every_kind_the_right_way_round(tmp_path):
    """An image that is white above and black below, in every form; each must decode to that."""
    truth = np.zeros((40, 40), np.uint8)
    truth[:20] = 255
    grey, rgb = Image.fromarray(truth), Image.fromarray(truth).convert("RGB")
    grey.save(tmp_path / "grey.png")
    rgb.save(tmp_path / "rgb.bmp")
    rgb.save(tmp_path / "lossless.webp", lossless=True)
    Image.fromarray(truth.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    rgb.quantize(2).save(tmp_path / "palette.png")
    grey.save(tmp_path / "two.gif", save_all=True, append_images=[Image.fromarray(255 - truth)])
    clear = np.zeros((40, 40, 4), np.uint8)
    clear[20:, :, 3] = 255    # transparent above, black below
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    turned = rgb.rotate(90, expand=True)    # stored on its side, with the EXIF tag that says so
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=100)
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste(rgb, (40, 0))
    wide.save(tmp_path / "wide.png")
    turned.save(tmp_path / "lzw.tif", compression="tiff_lzw", exif=exif)
    Image.fromarray(truth.astype(np.uint16) * 257).save(tmp_path / "sixteen.tiff")
    rgb.save(tmp_path / "web.jfif", "JPEG", quality=100)
    if features.check("avif"):
        turned.save(tmp_path / "turned.avif", exif=exif, quality=100)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 12 + features.check("avif")
    assert {path.suffix for path in paths} <= formats.SUFFIXES
    for path in paths:
        for channels in (1, 3):
            image = decode(path, 20, channels)
            assert image.shape == (channels, 20, 20) and image.dtype == np.uint8
            inside = image[:, :, 1:-1]    # resizing sees a little of what was cropped away
            assert inside[:, :9].min() > 240 and inside[:, 11:].max() < 15, path.name
    Image.fromarray(truth / np.float32(255)).save(tmp_path / "float.tiff")    # not black: refused
    with pytest.raises(ValueError):
        decode(tmp_path / "float.tiff", 20, 1)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation_is_read_and_nothing_else(tmp_path, orientation, suffix):
    """One file of valid EXIF, and one with other tags that cannot be read."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 4))    # no two of the eight ways look the same
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0128] = 2    # resolution in inches
    image.save(tmp_path / f"valid.{suffix}", exif=exif)
    with Image.open(tmp_path / f"valid.{suffix}") as valid:
        truth = ImageOps.exif_transpose(valid).convert("L")
    assert np.array_equal(decode(tmp_path / f"valid.{suffix}", 16, 1)[0], truth)
    if suffix != "tif":    # whose pixels cannot be found either without its tags
        raw = exif.tobytes()
        broken = raw.replace(b"\x01\x28\x00\x03", b"\x01\x28\x00\x04")    # of another type
        image.save(tmp_path / f"broken.{suffix}", exif=broken)
        assert np.array_equal(decode(tmp_path / f"broken.{suffix}", 16, 1)[0], truth)
        image.save(tmp_path / f"cut.{suffix}", exif=b"Exif\0\0MM\0\x2a" + bytes([orientation]))
        upright = np.asarray(image.convert("L"))
        assert abs(decode(tmp_path / f"cut.{suffix}", 16, 1)[0].astype(int) - upright).max() < 60


def test_an_eps_under_another_name_starts_no_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (40, 40)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UnidentifiedImageError):
        decode(tmp_path / "x.png", 20, 3)
    assert not (tmp_path / "started").exists()


def test_folder_is_decoded_once(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, broken=[6, 107])
    images = load("folder", tmp_path, image_size=28, channels=1)
    assert images.train.shape == (248, 1, 28, 28) and images.test.shape == (5, 1, 28, 28)
    assert images.train_labels.bincount().tolist() == [198, 50]
    mnist = load("mnist")
    assert torch.equal(images.train[:3], mnist.train[[0, 2, 4]])    # a/ has PNGs of even numbers
    said = capsys.readouterr().err
    assert "0006.png' cannot be decoded" in said and "0107.JPG' cannot be decoded" in said
    assert "decoded 253 of 255 images" in said

    monkeypatch.setattr(formats, "decode", None)    # a second start decodes nothing
    again = load("folder", tmp_path, image_size=28, channels=1)
    assert torch.equal(again.train, images.train)
    assert torch.equal(again.train_labels, images.train_labels)
    assert len(list(tmp_path.glob("*.bin"))) == 1 and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    a = tmp_path / "unlabeled" / "a"
    shutil.copy(a / "0002.png", a / "0000.png")    # a changed folder is decoded again
    changed = load("folder", tmp_path, image_size=28, channels=1)
    assert torch.equal(changed.train[:2], mnist.train[[2, 2]])
    assert torch.equal(again.train[:2], mnist.train[[0, 2]])    # the old cache, while it is in use
    assert len(list(tmp_path.glob("*.bin"))) == 1    # was replaced


def test_too_many_broken_files_stop_the_run(tmp_path):
    make_folder(tmp_path, broken=range(0, 200, 20))
    with pytest.raises(OSError, match=r"\d+ of 255 images cannot be decoded, more than 1 %"):
        load("folder", tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.tmp"))


def test_a_decompression_bomb_is_a_broken_file(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path)
    for name, height in [("bomb", 2001), ("half", 1001), ("large", 1000)]:
        Image.new("1", (1000, height)).save(tmp_path / "unlabeled" / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert len(load("folder", tmp_path).train) == 251
    said = capsys.readouterr().err
    assert "bomb.png' cannot be decoded (DecompressionBombError)" in said
    assert "half.png' cannot be decoded (DecompressionBombError)" in said


def test_few_images_are_decoded_at_once(tmp_path, monkeypatch):
    make_folder(tmp_path)
    at_once, most = set(), []

    def slow(path, image_size, channels):
        at_once.add(path)
        most.append(len(at_once))
        time.sleep(0.01)
        at_once.discard(path)
        return decode(path, image_size, channels)

    monkeypatch.setattr(formats, "decode", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    load("folder", tmp_path)
    assert 1 < max(most) <= 8


def test_resizing_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    assert abs(decode(tmp_path / "board.png", 16, 1).astype(int) - 127).max() < 8


def test_what_is_no_file_is_no_image(tmp_path, impatient):
    make_folder(tmp_path)
    (tmp_path / "unlabeled" / "folder.png").mkdir()
    (tmp_path / "unlabeled" / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "unlabeled" / "fifo.png")
    os.mkfifo(tmp_path / "decoded_32x3.bin")
    (tmp_path / "unlabeled" / "zero.png").symlink_to("/dev/zero")
    assert len(load("folder", tmp_path).train) == 250


@pytest.mark.parametrize("name", [
    ".ipynb_checkpoints/x.png", ".Trash-1000/files/x.png", "a/.hidden/b/x.png", ".x.png",
    "__MACOSX/a/._x.png", "__MACOSX/x.png", "$RECYCLE.BIN/x.png", "@eaDir/x.png/THUMB.jpg",
    "Thumbs.db", "a/desktop.ini", ".DS_Store",
])
def test_what_systems_leave_behind_is_skipped(tmp_path, capsys, name):
    make_folder(tmp_path, n=4)
    path = tmp_path / "unlabeled" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "unlabeled" / "a" / "0000.png", path)
    assert len(load("folder", tmp_path).train) == 5
    assert f"ignored in {tmp_path}: 1 .txt\n" in capsys.readouterr().err


def test_a_data_folder_below_a_hidden_one_is_read(tmp_path):
    make_folder(tmp_path / ".mine" / "x", n=4)
    assert len(load("folder", tmp_path / ".mine" / "x").train) == 5


def test_what_is_ignored_is_counted_by_suffix(tmp_path, capsys):
    make_folder(tmp_path, n=4)
    for i in range(3):
        (tmp_path / "sensitive" / f"{i}.HEIC").touch()
    (tmp_path / "normal_test" / "README").touch()
    (tmp_path / "normal_test" / "Dr. Who, 2nd part").touch()
    (tmp_path / "unlabeled" / "linked").symlink_to(tmp_path / "sensitive")
    load("folder", tmp_path)
    words = f"ignored in {tmp_path}: 3 .heic, 2 without suffix, 1 linked folder(s), 1 .txt"
    assert words in capsys.readouterr().err.splitlines()


def test_any_name_can_be_reported_in_any_encoding(tmp_path):
    """A broken file and an ignored one, with names that ASCII, or even UTF-8, cannot hold."""
    folder = tmp_path / "фото"
    make_folder(folder, n=300)
    names = [b"caf\xe9.png", b"a\nb\x1b[1m.png", b"x.\xff",
             "猫.png".encode(), "猫.фото".encode()]
    for name in names:
        try:
            (folder / "unlabeled" / os.fsdecode(name)).write_bytes(b"broken")
        except OSError:    # a file system may want UTF-8
            pass
    code = "import sys; from data import load; print(len(load('folder', sys.argv[1]).train))"
    result = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.stdout.strip() == b"375", result.stderr
    assert rb"\u732b.png' cannot be decoded" in result.stderr
    assert rb"1 .\u0444\u043e\u0442\u043e" in result.stderr and b"\x1b" not in result.stderr


# Where the cache of decoded images goes

@pytest.fixture
def read_only(monkeypatch):
    """A data folder beside the user's cache folder, where others than root reach it too."""
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_folder(root / "photos", n=20)
        (root / "cache").mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield root / "photos"


@contextlib.contextmanager
def without_rights(folder):
    """Takes the right to write to the folder; from root, who needs no rights, by being another."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        folder.parent.chmod(0o755)
        os.chown(folder.parent / "cache", 65534, -1)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_the_cache_of_a_read_only_folder_goes_elsewhere(read_only, capsys):
    with without_rights(read_only):
        images = load("folder", read_only)
        (cache,) = (read_only.parent / "cache" / "pu_diffusion").iterdir()
        words = f"{read_only} is read-only: its decoded images are kept in {cache}"
        assert capsys.readouterr().err.splitlines()[1] == words
        assert [path.name for path in cache.iterdir()] == ["decoded_32x3.bin"]
        again = load("folder", read_only)
        assert "decoded " not in capsys.readouterr().err.replace("its decoded images", "")
    assert torch.equal(again.train, images.train) and len(again.train) == 25
    assert not list(read_only.glob("decoded*"))

    shutil.copy(cache / "decoded_32x3.bin", read_only)    # someone decoded it before
    shutil.rmtree(cache)
    with without_rights(read_only):
        assert torch.equal(load("folder", read_only).train, images.train)
    assert not cache.exists()


def test_what_a_killed_decoding_leaves_is_removed(tmp_path):
    make_folder(tmp_path, n=1000)
    code = "import sys; from data import load; load('folder', sys.argv[1], image_size=256)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT,
                          stderr=subprocess.PIPE) as decoding:
        said = b""
        while b"\rdecoded" not in said:
            byte = decoding.stderr.read(1)
            assert byte, said
            said += byte
        decoding.kill()
    (left,) = tmp_path.glob("decoded_*.tmp")
    load("folder", tmp_path)
    assert left.exists()    # it could belong to a run that goes on
    ago = time.time() - 3600
    os.utime(left, (ago, ago))
    load("folder", tmp_path, image_size=16)
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("*.bin"))) == 2


def test_half_a_cache_is_decoded_again(tmp_path):
    make_folder(tmp_path)
    load("folder", tmp_path)
    (cache,) = tmp_path.glob("*.bin")
    whole = cache.read_bytes()
    record = (len(whole) - 36) // 255
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for damaged in [b"", whole[:30], whole[:50], whole[:200 * record], whole[:-4], flipped]:
        cache.write_bytes(damaged)
        assert len(load("folder", tmp_path).train) == 250
        assert cache.read_bytes() == whole


def test_all_sensitive_images_broken(tmp_path):
    make_folder(tmp_path)
    shutil.rmtree(tmp_path / "sensitive")
    (tmp_path / "sensitive").mkdir()
    (tmp_path / "sensitive" / "x.png").write_text("broken")
    with pytest.raises(OSError, match="sensitive holds no images"):
        load("folder", tmp_path)


def test_an_empty_folder_gets_the_layout_drawn(tmp_path):
    with pytest.raises(OSError, match="unlabeled holds no images") as e:
        load("folder", tmp_path)
    assert f"{tmp_path}/sensitive/..." in str(e.value)
    make_folder(tmp_path)
    shutil.rmtree(tmp_path / "sensitive")
    with pytest.raises(OSError, match="sensitive holds no images"):
        load("folder", tmp_path)


# Downloads: a server on this machine that does everything wrong

FILES = {}    # name -> bytes


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self):
        manner, name = self.path.strip("/").split("/")
        body = FILES[name]
        if manner in ("404", "500"):
            return self.send_error(int(manner))
        if manner in ("hub", "other"):    # promises a file, or another one, and says where it lies
            self.send_response(302)
            content = body if manner == "hub" else b"something else"
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Location", f"/ok/{name}")
            return self.end_headers()
        self.send_response(200)
        if manner == "portal":
            body = b"<html>Please log in</html>"
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if manner == "wrong":
            body = bytes(len(body))
        if manner == "stall":
            self.wfile.write(body[:100])
            self.wfile.flush()
            return time.sleep(3)
        self.wfile.write(body[:len(body) // 2] if manner == "cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def serve_cifar10(monkeypatch, server, manners, tmp_path, edit=lambda tar: None):
    if not (tmp_path / "source").exists():
        write_cifar10(tmp_path / "source" / "cifar-10-batches-bin")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-bin", "cifar-10-batches-bin")
        edit(tar)
    FILES["cifar.tar.gz"] = stream.getvalue()
    md5 = hashlib.md5(stream.getvalue()).hexdigest()
    urls = [f"{server}/{manner}/cifar.tar.gz" for manner in manners]
    archive = dict(urls=urls, md5=md5, top="cifar-10-batches-bin")
    monkeypatch.setitem(formats.ARCHIVES, "cifar10", archive)


def test_download_unpacks_and_is_not_repeated(tmp_path, monkeypatch, server):
    serve_cifar10(monkeypatch, server, ["ok"], tmp_path)
    assert load("cifar10", tmp_path / "data").train.shape == (10, 3, 32, 32)
    left = [path.name for path in (tmp_path / "data" / "cifar10").iterdir()]
    assert left == ["cifar-10-batches-bin"]
    FILES.clear()
    assert load("cifar10", tmp_path / "data").test.shape == (5, 3, 32, 32)


@pytest.mark.parametrize("manner, words", [
    ("cut", "bytes|IncompleteRead"), ("wrong", "expected MD5 .*, found"), ("404", "404"),
    ("500", "500"), ("stall", "timed out"), ("portal", "a web page came instead"),
])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, server, manner, words):
    monkeypatch.setattr(formats, "TIMEOUT", 0.5)
    serve_cifar10(monkeypatch, server, [manner], tmp_path)
    words = f"cifar.tar.gz could not be downloaded.*({words}).*put that file at"
    with pytest.raises(OSError, match=words):
        load("cifar10", tmp_path / "data")
    assert not list((tmp_path / "data" / "cifar10").iterdir())
    serve_cifar10(monkeypatch, server, [manner, "ok"], tmp_path)    # a second address makes good
    assert load("cifar10", tmp_path / "data").train.shape == (10, 3, 32, 32)


def test_the_checksum_of_the_hub_is_verified(tmp_path, server):
    FILES["weights"] = b"weights"
    with pytest.raises(OSError, match="weights could not be downloaded.*expected SHA256"):
        formats.fetch([f"{server}/other/weights"], tmp_path / "weights", lambda path: None)
    assert not list(tmp_path.iterdir())
    formats.fetch([f"{server}/hub/weights"], tmp_path / "weights", lambda path: None)
    assert (tmp_path / "weights").read_bytes() == b"weights"


def test_what_a_killed_download_leaves_is_removed(tmp_path, server):
    FILES["a[1].gz"] = b"content"
    for name in ["a[1].gz.7.tmp", "a[1].gz.8.tmp", "b.gz.7.tmp"]:    # only the second is in use
        (tmp_path / name).touch()
    for name in ["a[1].gz.7.tmp", "b.gz.7.tmp"]:
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    formats.fetch([f"{server}/ok/a[1].gz"], tmp_path / "a[1].gz", lambda path: None)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a[1].gz", "a[1].gz.8.tmp", "b.gz.7.tmp"]


def member(name, **kind):
    info = tarfile.TarInfo(name)
    for key, value in kind.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("evil", [
    member("../../escaped"),
    member("cifar-10-batches-bin/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("cifar-10-batches-bin/link", type=tarfile.LNKTYPE, linkname="../../../escaped"),
    member("cifar-10-batches-bin/device", type=tarfile.CHRTYPE),
])
def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path, monkeypatch, server, evil):
    serve_cifar10(monkeypatch, server, ["ok"], tmp_path, lambda tar: tar.addfile(evil))
    with pytest.raises(OSError, match="cifar.tar.gz cannot be unpacked"):
        load("cifar10", tmp_path / "data")
    left = [path.name for path in (tmp_path / "data" / "cifar10").iterdir()]
    assert left == ["cifar.tar.gz"]
    assert not list(tmp_path.rglob("escaped"))


def test_an_absolute_path_in_an_archive_stays_inside(tmp_path, monkeypatch, server):
    target = tmp_path / "absolute"
    serve_cifar10(monkeypatch, server, ["ok"], tmp_path,
                  lambda tar: tar.addfile(member(str(target))))
    assert load("cifar10", tmp_path / "data").train.shape == (10, 3, 32, 32)
    assert not target.exists()


def test_an_archive_already_there_is_verified_too(tmp_path, monkeypatch, server):
    serve_cifar10(monkeypatch, server, ["ok"], tmp_path)
    archive = tmp_path / "data" / "cifar10" / "cifar.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(FILES["cifar.tar.gz"] + b"x")
    with pytest.raises(OSError, match="cifar.tar.gz is not the published file.*delete it"):
        load("cifar10", tmp_path / "data")


def test_an_archive_without_its_folder(tmp_path, monkeypatch, server):
    serve_cifar10(monkeypatch, server, ["ok"], tmp_path)
    archive = {**formats.ARCHIVES["cifar10"], "top": "another-name"}
    monkeypatch.setitem(formats.ARCHIVES, "cifar10", archive)
    with pytest.raises(OSError, match="cannot be unpacked"):
        load("cifar10", tmp_path / "data")


def test_fashion_mnist_downloads_its_four_files(tmp_path, monkeypatch, server):
    """MNIST's own files under Fashion-MNIST's names; the first address serves nonsense."""
    for path in (DATA_DIR / "mnist").glob("*.gz"):
        FILES[path.name] = path.read_bytes()
    monkeypatch.setitem(formats.IDX_SHA256, "fashion_mnist", formats.IDX_SHA256["mnist"])
    monkeypatch.setattr(formats, "FASHION_URLS", [f"{server}/wrong/", f"{server}/ok/"])
    assert torch.equal(load("fashion_mnist", tmp_path).train, load("mnist").train)
    assert len(list((tmp_path / "fashion_mnist").iterdir())) == 4
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "fashion_mnist" / name).unlink()
    raw = gzip.decompress(FILES[name])
    FILES[name] = gzip.compress(raw[:-1] + b"\7")    # well-formed, and not the published file
    with pytest.raises(OSError, match=f"{name} could not be downloaded.*altered"):
        load("fashion_mnist", tmp_path)
    assert not (tmp_path / "fashion_mnist" / name).exists()
