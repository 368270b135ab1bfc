"""Data sets in their published layouts, byte by byte; a folder of images; hostile downloads."""
import gzip
import hashlib
import io
import os
import shutil
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, random_bytes, write_celeba, write_cifar10
from PIL import Image, ImageOps, features

import formats
from data import DATA_DIR, has_class, load, parse_classes
from formats import decode, image_files, read_idx
from runtime import UserError

REAL = Path(os.environ.get("PU_DATA", "no such folder"))    # holds fashion_mnist/ and cifar10/


def test_idx_files(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    raw = b"\0\0\x08\x03" + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path, sha256 = tmp_path / "a.gz", hashlib.sha256(raw).hexdigest()
    path.write_bytes(gzip.compress(raw))
    assert np.array_equal(read_idx(path, sha256), array)
    for altered in [gzip.compress(raw[:-1] + b"\7"), gzip.compress(raw)[:-9], b"<html>404"]:
        path.write_bytes(altered)
        with pytest.raises(UserError, match="a.gz is missing, or not the published file"):
            read_idx(path, sha256)
    with pytest.raises(UserError, match="train-images.*is missing"):
        load("mnist", tmp_path)


def test_cifar10_layout(tmp_path):
    """A pixel's place in the file is computed from the published description, here and below."""
    write_cifar10(tmp_path / "cifar10" / "cifar-10-batches-bin")
    images = load("cifar10", tmp_path)
    assert images.train.shape == (10, 3, 32, 32) and images.test.shape == (5, 3, 32, 32)
    for name, x, y in [("data_batch_2", images.train[5:], images.train_labels[5:]),
                       ("test_batch", images.test, images.test_labels)]:
        raw = (tmp_path / "cifar10" / "cifar-10-batches-bin" / f"{name}.bin").read_bytes()
        assert y.tolist() == [raw[3073 * i] for i in range(5)]
        for i, channel, row, column in [(0, 0, 0, 0), (3, 1, 7, 30), (4, 2, 31, 31)]:
            place = 3073 * i + 1 + 1024 * channel + 32 * row + column
            assert x[i, channel, row, column] == raw[place]


def test_stl10_layout_is_column_by_column(tmp_path):
    folder = tmp_path / "stl10" / "stl10_binary"
    folder.mkdir(parents=True)
    for part, labels in [("train", [7, 7, 7, 7]), ("test", [1, 10, 5, 2])]:
        (folder / f"{part}_X.bin").write_bytes(random_bytes(4 * 3 * 96 * 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    images = load("stl10", tmp_path)
    assert images.train_labels.tolist() == [6] * 4 and images.test_labels.tolist() == [0, 9, 4, 1]
    for name, x in [("train_X.bin", images.train), ("test_X.bin", images.test)]:
        raw = (folder / name).read_bytes()
        for i, channel, row, column in [(0, 0, 0, 1), (2, 1, 7, 90), (3, 2, 95, 95)]:
            assert x[i, channel, row, column] == raw[27648 * i + 9216 * channel + 96 * column + row]


@pytest.mark.skipif(not REAL.exists(), reason="PU_DATA is not set")
def test_real_files():
    fashion, cifar = load("fashion_mnist", REAL), load("cifar10", REAL)
    assert fashion.train.shape == (60000, 1, 28, 28)
    assert fashion.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    for labels in [cifar.train_labels, cifar.test_labels]:    # PU_DATA may hold a part of it
        assert labels.bincount().tolist() == [len(labels) // 10] * 10


def test_celeba(tmp_path):
    write_celeba(tmp_path / "celeba")
    images = load("celeba", tmp_path, image_size=64)
    assert images.train.shape == images.test.shape == (1, 3, 64, 64)    # one is for validation
    red, green, blue = images.train[0].float()
    assert red[:, :28].mean() > 230 and blue[:, 36:].mean() > 230 and green[5:-5].mean() < 30
    for word, expected in [("Male", True), ("female", False), ("male,female", True)]:
        labels = torch.cat([images.train_labels, images.test_labels])    # [2, 80]
        assert has_class(labels, parse_classes("celeba", word)).tolist() == [expected] * 2
    assert torch.equal(labels[:, :40], ~labels[:, 40:])
    attributes = tmp_path / "celeba" / "list_attr_celeba.txt"    # labels of other images
    text = attributes.read_text()
    for altered in [text.replace("000002.jpg", "000003.jpg"), text[:-30], "<html>\n" * 3]:
        attributes.write_text(altered)
        with pytest.raises(UserError, match="lists"):
            load("celeba", tmp_path, image_size=64)
    attributes.unlink()
    with pytest.raises(UserError, match="needs list_attr_celeba.txt, unpacked"):
        load("celeba", tmp_path)


def test_decode_reads_every_kind_the_right_way_round(tmp_path):
    """An image that is white above and black below, in every form; each must decode to that."""
    truth = np.zeros((40, 40), np.uint8)
    truth[:20] = 255
    grey, rgb = Image.fromarray(truth), Image.fromarray(truth).convert("RGB")
    sixteen = Image.fromarray(truth.astype(np.uint16) * 257)
    clear = Image.fromarray(np.stack([0 * truth, 0 * truth, 0 * truth, 255 - truth], axis=2))
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste(rgb, (40, 0))
    turned, exif = rgb.rotate(90), Image.Exif()    # stored on its side, and a tag that says so
    exif[0x0112], exif[0x0128] = 6, 2    # and resolution in inches; here its type is wrong:
    broken = exif.tobytes().replace(b"\1\x28\0\3", b"\1\x28\0\4")
    for name, image, options in [
            ("grey.png", grey, {}), ("rgb.bmp", rgb, {}), ("web.webp", rgb, {"lossless": True}),
            ("sixteen.png", sixteen, {}), ("sixteen.tiff", sixteen, {}), ("wide.png", wide, {}),
            ("palette.png", rgb.quantize(2), {}), ("clear.png", clear, {}),
            ("two.gif", grey, {"save_all": True, "append_images": [ImageOps.invert(grey)]}),
            ("exif.jpg", turned, {"exif": exif, "quality": 100}),
            ("broken.jpg", turned, {"exif": broken, "quality": 100}),
            ("lzw.tif", turned, {"exif": exif, "compression": "tiff_lzw"}),
            ("turned.avif", turned, {"exif": exif, "quality": 100})]:
        if features.check("avif") or not name.endswith("avif"):
            image.save(tmp_path / name, **options)
    paths = image_files(tmp_path)
    assert len(paths) >= 11
    for path in paths:
        for channels in (1, 3):
            image = decode(path, 20, channels)
            assert image.shape == (channels, 20, 20) and image.dtype == np.uint8
            inside = image[:, :, 1:-1]    # resizing sees a little of what was cropped away
            assert inside[:, :9].min() > 240 and inside[:, 11:].max() < 15, path.name
    board = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255    # resizing is antialiased
    Image.fromarray(board).save(tmp_path / "board.png")
    assert abs(decode(tmp_path / "board.png", 16, 1).astype(int) - 127).max() < 8
    Image.fromarray(truth / np.float32(255)).save(tmp_path / "float.tiff")    # not black: refused
    with pytest.raises(ValueError, match="floating-point"):
        decode(tmp_path / "float.tiff", 20, 1)


def test_an_eps_under_another_name_starts_no_ghostscript(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png", "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        decode(tmp_path / "x.png", 20, 3)


@pytest.fixture
def said(monkeypatch):
    """The lines that formats.py prints on stderr."""
    lines = []
    monkeypatch.setattr(formats, "warn", lambda line="", **_: lines.append(line.strip("\r")))
    return lines


def test_a_folder_is_decoded_once(tmp_path, monkeypatch, said):
    def load_folder():
        return load("folder", tmp_path, image_size=28, channels=1)

    make_folder(tmp_path, broken=[6, 107])
    images, mnist = load_folder(), load("mnist").train
    assert images.train_labels.bincount().tolist() == [198, 50] and len(images.test) == 5
    assert torch.equal(images.train[:99], mnist[[i for i in range(0, 200, 2) if i != 6]])
    monkeypatch.setattr(formats, "decode", None)    # a second start decodes nothing
    assert all(map(torch.equal, vars(load_folder()).values(), vars(images).values()))
    monkeypatch.undo()
    a = tmp_path / "unlabeled" / "a"    # PNGs of even numbers
    size = (a / "0000.png").stat().st_size    # a changed file is noticed, also of this size
    (a / "0000.png").write_bytes((a / "0002.png").read_bytes().ljust(size))
    assert (a / "0000.png").stat().st_size == size
    assert torch.equal(load_folder().train[:2], mnist[[2, 2]])
    assert torch.equal(images.train[:2], mnist[[0, 2]])    # the old file, while it is in use
    load("folder", tmp_path, image_size=14)
    names = [path.name[:13] for path in sorted(tmp_path.glob("decoded*"))]
    assert names == ["decoded_14x3_", "decoded_28x1_"]
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "decoded" in line]
    assert maps and all(" r--s " in line for line in maps)    # no memory is reserved for them


def test_broken_files(tmp_path, said):
    """At most 1 % are named and skipped. Above, no half a file of decoded images is left."""
    make_folder(tmp_path, broken=[6, 107])
    assert len(load("folder", tmp_path).train) == 248
    skipped = [line for line in said if line.startswith("skipped")]
    assert len(skipped) == 2 and "0006.png': cannot identify" in skipped[0]
    (tmp_path / "sensitive" / "third.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="3 of 256 images cannot be decoded, more than 1 %"):
        load("folder", tmp_path)
    assert len(list(tmp_path.glob("decoded*"))) == 1


@pytest.mark.parametrize("bits", [12, 13])
def test_12_bits_in_16_are_noticed(tmp_path, said, bits):
    for name in ["unlabeled/x.png", "sensitive/x.png"]:
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.full((9, 9), 2 ** bits - 1, np.uint16)).save(tmp_path / name)
    load("folder", tmp_path)
    assert any("nearly black" in line for line in said) == (bits == 12)


def test_no_image_is_left_out_without_a_word(tmp_path, said):
    folder = tmp_path / ".mine" / "unlabeled"    # only what is hidden inside of it is skipped
    make_folder(folder.parent, n=4)
    odd = os.fsdecode(b"caf\xe9.png")
    for name in ["a/.hidden/b/x.png", ".x.png", "@eaDir/x.png/THUMB.jpg", odd]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "a" / "0000.png", folder / name)
    for name in ["1.HEIC", "2.heic", "3.heic", "README", "LICENSE"]:
        (folder / name).touch()
    (folder / "linked").symlink_to(folder / "a")
    names = ["0000.png", "0002.png", "0001.JPG", "0003.JPG", odd]
    assert [path.name for path in image_files(folder)] == names
    assert said == [f"ignored in {folder}: 3 .heic, 2 without suffix, 1 linked folder(s), 1 .txt"]
    assert len(load("folder", folder.parent).train) == 6
    (folder / "nowhere.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="nowhere.png"):
        load("folder", folder.parent)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="unlabeled holds no images(.|\n)*/sensitive/..."):
        load("folder", folder.parent)


def test_where_nothing_can_be_written_images_are_decoded_into_memory(tmp_path, monkeypatch, said):
    make_folder(tmp_path, n=20)
    mapped = load("folder", tmp_path)
    for path in tmp_path.glob("decoded*"):
        path.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)    # for root, all can be written
    assert all(map(torch.equal, vars(load("folder", tmp_path)).values(), vars(mapped).values()))
    assert any("cannot be written" in line for line in said) and not list(tmp_path.glob("decoded*"))


# Downloads: a server on this machine that does everything wrong

FILES = {}    # name -> bytes


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self):
        manner, name = self.path.strip("/").split("/")
        body = bytes(len(FILES[name])) if manner == "wrong" else FILES[name]
        self.send_response(404 if manner == "404" else 200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body[:100] if manner in ("cut", "stall") else body)
        self.wfile.flush()
        time.sleep(1 if manner == "stall" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 100))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    set_timeout(None)


@pytest.fixture
def serve(tmp_path, monkeypatch, server):
    """-> a function that has a small CIFAR-10 served in several manners"""
    def serve(*manners):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            tar.add(tmp_path / "source", "cifar-10-batches-bin")
        FILES["cifar.tar.gz"] = stream.getvalue()
        urls = [f"{server}/{manner}/cifar.tar.gz" for manner in manners]
        md5 = hashlib.md5(stream.getvalue()).hexdigest()
        monkeypatch.setitem(formats.ARCHIVES, "cifar10", (urls, md5, "cifar-10-batches-bin"))

    write_cifar10(tmp_path / "source")
    return serve


@pytest.mark.parametrize("manner, reason", [("cut", "another file"), ("wrong", "ask for a login"),
                                            ("404", "404"), ("stall", "timed out")])
def test_downloads(tmp_path, serve, manner, reason):
    """What fails leaves nothing; a second address makes good; what is there is verified too."""
    serve(manner)
    with pytest.raises(UserError, match=f"cifar.tar.gz could not be downloaded.*{reason}"):
        load("cifar10", tmp_path)
    assert os.listdir(tmp_path / "cifar10") == []
    serve(manner, "ok")
    (tmp_path / "cifar10" / "cifar.tar.gz").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cifar.tar.gz is not the published file"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar10" / "cifar.tar.gz").unlink()
    assert load("cifar10", tmp_path).train.shape == (10, 3, 32, 32)
    assert os.listdir(tmp_path / "cifar10") == ["cifar-10-batches-bin"]
    FILES.clear()
    assert load("cifar10", tmp_path).test.shape == (5, 3, 32, 32)


def test_fashion_mnist_downloads_its_four_files(tmp_path, monkeypatch, server):
    """MNIST's own files under Fashion-MNIST's names; the first address serves nonsense."""
    FILES.update((path.name, path.read_bytes()) for path in (DATA_DIR / "mnist").glob("*.gz"))
    monkeypatch.setitem(formats.IDX_SHA256, "fashion_mnist", formats.IDX_SHA256["mnist"])
    monkeypatch.setattr(formats, "FASHION_URLS", [f"{server}/wrong/", f"{server}/ok/"])
    assert torch.equal(load("fashion_mnist", tmp_path).train, load("mnist").train)
    assert sorted(os.listdir(tmp_path / "fashion_mnist")) == sorted(formats.IDX_FILES)
