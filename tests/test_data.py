"""The data: the real MNIST files and damaged copies of them, splits counted to the image, and PNGs read back."""
import gzip
import hashlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import DATA_DIR, DATASETS, Images, load, parse_classes, pu_split
from formats import read_idx
from images import save_grid, save_png, to_uint8

MNIST = load("mnist")
ODD = [1, 3, 5, 7, 9]


def test_mnist_is_mnist():
    assert MNIST.train.shape == (60000, 1, 28, 28) and MNIST.test.shape == (10000, 1, 28, 28)
    assert MNIST.train.dtype == torch.uint8 and MNIST.train_labels.dtype == torch.int64
    assert MNIST.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert MNIST.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert MNIST.train.double().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


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


@pytest.mark.parametrize("edit, words", [
    (lambda raw: raw[:-1], "wrong size: its header promises 10000 bytes of data, found 9999"),
    (lambda raw: raw + b"\0", "wrong size: its header promises 10000 bytes of data, found 10001"),
    (lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:], "has been altered: expected SHA-256 ff7bcfd4.*, found "),
    (lambda raw: b"\x89PNG" + raw[4:], "is not an IDX file of bytes: it starts with 89 50 4e 47"),
    (lambda raw: b"", "is not an IDX file of bytes"),
])
def test_an_altered_file_is_refused_and_says_how(copy, edit, words):
    path = copy / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()))))
    with pytest.raises(OSError, match=f"t10k-labels-idx1-ubyte.gz.*{words}"):
        load("mnist", copy)


def test_a_file_that_is_not_gzip_is_refused(copy):
    (copy / "mnist" / "t10k-labels-idx1-ubyte.gz").write_text("<html>404</html>")
    with pytest.raises(OSError, match="t10k-labels-idx1-ubyte.gz is damaged"):
        load("mnist", copy)


def test_read_idx_round_trip(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    raw = b"\0\0\x08\x03" + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    assert np.array_equal(read_idx(tmp_path / "a.gz", hashlib.sha256(raw).hexdigest()), array)


def test_unknown_data_set_lists_the_known():
    with pytest.raises(ValueError, match="unknown data set 'imagenet'.*mnist"):
        load("imagenet")


@pytest.mark.parametrize("text, classes", [
    ("odd", ODD), ("even", [0, 2, 4, 6, 8]), ("7", [7]), ("4, 7", [4, 7]), ("7,4,7", [4, 7]), ("even,1", [0, 1, 2, 4, 6, 8]),
    ("ODD", ODD),
])
def test_parse_classes(text, classes):
    assert parse_classes("mnist", text) == classes


@pytest.mark.parametrize("text, words", [
    ("10", "no class '10': choose among even, odd, 0, 1"), ("cat", "no class 'cat'"), ("", "no class ''"), ("1,,2", "no class ''"),
    ("-1", "no class '-1'"), ("odd,even", "every class of mnist is sensitive"), ("0,1,2,3,4,5,6,7,8,9", "every class"),
])
def test_parse_classes_refuses(text, words):
    with pytest.raises(ValueError, match=words):
        parse_classes("mnist", text)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prior", [0.5, 1 / 11, 0.1, 0.01, 0.3333])
@pytest.mark.parametrize("sensitive", [ODD, [4], [0, 2, 4, 6, 8]])
def test_split_is_exact(seed, prior, sensitive):
    n_unlabeled, n_labeled = 5000, 2500
    u, s, test_normal = pu_split(MNIST, sensitive, prior, n_unlabeled, n_labeled, seed)
    sensitive = torch.tensor(sensitive)
    assert len(u) == n_unlabeled and len(s) == n_labeled
    assert torch.isin(MNIST.train_labels[u], sensitive).sum() == round(prior * n_unlabeled)
    assert torch.isin(MNIST.train_labels[s], sensitive).all()
    assert len(torch.cat([u, s]).unique()) == n_unlabeled + n_labeled                 # disjoint, no image twice
    assert torch.equal(test_normal, torch.tensor([i for i, y in enumerate(MNIST.test_labels.tolist()) if y not in sensitive]))
    again = pu_split(MNIST, sensitive.tolist(), prior, n_unlabeled, n_labeled, seed)
    other = pu_split(MNIST, sensitive.tolist(), prior, n_unlabeled, n_labeled, seed + 1)
    assert torch.equal(u, again[0]) and torch.equal(s, again[1])
    assert not torch.equal(u, other[0]) and not torch.equal(s, other[1])


def test_the_papers_sizes():
    info = DATASETS["mnist"]
    u, s, test_normal = pu_split(MNIST, parse_classes("mnist", info["sensitive"]), 1 / 11, 27500, info["n_labeled"])
    assert torch.isin(MNIST.train_labels[u], torch.tensor(ODD)).sum() == 2500 and info["n_normal"] == 25000
    assert len(test_normal) == 4926
    assert len(pu_split(MNIST, [0, 2, 4, 6, 8], 1 / 11, 27500, 2500)[2]) == 5074


def test_u_is_in_random_order():
    u, _, _ = pu_split(MNIST, ODD, 0.5, 50000, 2500)
    first = torch.isin(MNIST.train_labels[u[:1000]], torch.tensor(ODD)).double().mean()
    assert abs(first - 0.5) < 4 * 0.5 / 1000 ** 0.5


def random_labels(n, n_pos):
    labels = torch.zeros(n, dtype=torch.int64)
    labels[torch.randperm(n)[:n_pos]] = 1
    return Images(None, labels, None, labels)


@pytest.mark.parametrize("prior", [0.5, 0.05, 0.9, 1 / 3, 1 / 11])
@pytest.mark.parametrize("n_pos", [10, 57, 90])
def test_an_infeasible_size_names_the_largest_that_works(prior, n_pos):
    data, n_labeled = random_labels(100, n_pos), 3
    with pytest.raises(ValueError, match="use n_unlabeled of at most") as e:
        pu_split(data, [1], prior, 100, n_labeled)
    largest = int(re.search(r"at most ([\d,]+)", str(e.value))[1].replace(",", ""))
    u, s, _ = pu_split(data, [1], prior, largest, n_labeled)
    assert len(u) == largest and len(s) == n_labeled
    with pytest.raises(ValueError, match="at most"):
        pu_split(data, [1], prior, largest + 1, n_labeled)


def test_other_infeasible_wishes():
    data = random_labels(100, 50)
    with pytest.raises(ValueError, match="n_labeled = 50 is not possible: there are 50 sensitive images"):
        pu_split(data, [1], 0.5, 10, 50)
    with pytest.raises(ValueError, match="use a larger n_unlabeled"):
        pu_split(data, [1], 0.01, 10, 5)


def test_to_uint8_inverts_scaling_for_every_byte():
    byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(byte.float() / 127.5 - 1), byte)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "image")    # a PNG whatever its name
    with Image.open(tmp_path / "image") as opened:
        assert opened.format == "PNG"
        pixels = torch.from_numpy(np.array(opened)).reshape(5, 7, channels)
    assert torch.equal(pixels.permute(2, 0, 1), image)


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (7, 3, 3), (64, 8, 8), (12, 3, 4)])
def test_grid_places_every_image(tmp_path, n, rows, columns):
    images = torch.randint(255, (n, 1, 4, 6), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png")
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png")))
    assert grid.shape == (rows * 5 - 1, columns * 7 - 1)
    for i in range(rows * columns):
        tile = grid[i // columns * 5:, i % columns * 7:][:4, :6]
        assert torch.equal(tile, images[i, 0]) if i < n else (tile == 255).all()
    assert (grid[4::5] == 255).all() and (grid[:, 6::7] == 255).all()    # the lines between them
