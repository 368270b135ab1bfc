"""Default sizes of the data sets, splits counted to the image, and the preview command."""
import argparse
import re

import pytest
import torch
from conftest import make_folder, refused, run
from PIL import Image

import data
from data import DATASETS, Images, has_class, load, parse_classes, pu_split, split
from images import grid, load_png, numbered
from runtime import UserError

MNIST = load("mnist")
ODD = [1, 3, 5, 7, 9]


def test_parse_classes():
    for text, classes in [("odd", ODD), (None, ODD), ("ODD", ODD), ("7,4, 7", [4, 7]),
                          ("even,1", [0, 1, 2, 4, 6, 8])]:
        assert parse_classes("mnist", text) == classes
    for text, words in [("10", "no class '10'"), ("cat", "no class 'cat'"), ("1,,2", "no class ''"),
                        ("-1", "no class '-1'"), ("odd,even", "every class of mnist")]:
        with pytest.raises(UserError, match=words):
            parse_classes("mnist", text)


@pytest.mark.parametrize("name, normal, sensitive, counts", [
    ("mnist", "even", "odd", (25000, 2500, 128)),
    ("cifar10", "vehicles", "animals", (20000, 2000, 128)),
    ("stl10", "vehicles", "animals", (2000, 200, 32)),
])
def test_the_papers_classes_and_sizes(name, normal, sensitive, counts):
    defaults, classes = DATASETS[name], DATASETS[name]["classes"]
    assert defaults["sensitive"] == sensitive
    assert (defaults["n_normal"], defaults["n_labeled"], defaults["batch_size"]) == counts
    assert sorted(parse_classes(name, normal) + parse_classes(name, sensitive)) == list(range(10))
    if normal == "vehicles":
        assert [classes[i] for i in parse_classes(name, normal)] == (
            ["airplane", "automobile" if name == "cifar10" else "car", "ship", "truck"])


def test_the_papers_split_of_mnist():
    u, s, test_normal = split("mnist", MNIST, prior=1 / 11)
    assert (len(u), len(s), len(test_normal)) == (27500, 2500, 4926)
    assert has_class(MNIST.train_labels[u], ODD).sum() == 2500
    assert len(split("mnist", MNIST, "even", 1 / 11)[2]) == 5074


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("prior", [0.5, 1 / 11, 0.01])
@pytest.mark.parametrize("sensitive", [ODD, [4]])
def test_split_is_exact(seed, prior, sensitive):
    n_unlabeled, n_labeled = 5000, 2500
    u, s, test_normal = pu_split(MNIST, sensitive, prior, n_unlabeled, n_labeled, seed)
    assert len(u) == n_unlabeled and len(s) == n_labeled
    in_u = has_class(MNIST.train_labels[u], sensitive)
    assert in_u.sum() == round(prior * n_unlabeled)
    assert abs(in_u[:1000].double().mean() - prior) < 4 * (prior / 1000) ** 0.5    # random order
    assert has_class(MNIST.train_labels[s], sensitive).all()
    assert len(torch.cat([u, s]).unique()) == n_unlabeled + n_labeled    # disjoint, none twice
    labels = MNIST.test_labels.tolist()
    assert test_normal.tolist() == [i for i, y in enumerate(labels) if y not in sensitive]
    again = pu_split(MNIST, sensitive, prior, n_unlabeled, n_labeled, seed)
    other = pu_split(MNIST, sensitive, prior, n_unlabeled, n_labeled, seed + 1)
    assert torch.equal(u, again[0]) and torch.equal(s, again[1])
    assert not torch.equal(u, other[0]) and not torch.equal(s, other[1])


def test_s_can_show_a_part_of_what_is_sensitive():
    """U is what it was; S has only these classes."""
    whole, part = (split("mnist", MNIST, labeled=labeled) for labeled in (None, "1,3,5"))
    assert torch.equal(whole[0], part[0]) and len(part[1]) == 2500
    assert MNIST.train_labels[part[1]].unique().tolist() == [1, 3, 5]
    assert len(torch.cat(part[:2]).unique()) == len(part[0]) + 2500    # disjoint


@pytest.mark.parametrize("prior", [0.5, 0.05, 0.9, 1 / 3])
@pytest.mark.parametrize("n_sensitive", [10, 57, 90])
def test_an_infeasible_size_names_the_largest_that_works(prior, n_sensitive):
    labels = torch.zeros(100, dtype=torch.int64)
    labels[torch.randperm(100)[:n_sensitive]] = 1
    images = Images(None, labels, None, labels)
    with pytest.raises(UserError, match="--n_unlabeled 100") as error:
        pu_split(images, [1], prior, 100, n_labeled=3)
    largest = int(re.search(r"(\d+) at most", str(error.value))[1])
    u, s, _ = pu_split(images, [1], prior, largest, n_labeled=3)
    assert len(u) == largest and len(s) == 3
    for n_unlabeled, n_labeled in [(largest + 1, 3), (10, n_sensitive), (1, 3)]:
        with pytest.raises(UserError):
            pu_split(images, [1], prior, n_unlabeled, n_labeled)


def flags(*words):
    parser = argparse.ArgumentParser()
    data.data_flags(parser)
    args = parser.parse_args(words)
    data.check_data_flags(args)
    return args


def test_photographs_are_mirrored_by_default_and_own_images_are_not():
    own = ["--dataset", "folder", "--prior", "0.1"]
    assert not flags(*own).hflip and not flags().hflip    # digits
    assert flags(*own, "--hflip").hflip and flags("--dataset", "cifar10").hflip
    assert not flags("--dataset", "cifar10", "--no-hflip").hflip


def test_the_prior_of_a_folder_is_never_guessed():
    assert flags().prior == 0.5 and flags("--dataset", "folder", "--prior", "1/11").prior == 1 / 11
    with pytest.raises(UserError, match="--dataset folder needs --prior"):
        flags("--dataset", "folder")


def test_a_folder_is_trained_on_and_sampled(tmp_path):
    make_folder(tmp_path / "images", broken=[50])
    images = load("folder", tmp_path / "images")
    assert [len(index) for index in split("folder", images)] == [199, 50, 5]
    with pytest.raises(UserError, match="split already"):
        split("folder", images, sensitive="cat")
    trained = run("train.py", "--device", "cpu", "--dataset", "folder", "--prior", "0.3",
                  "--data_dir", tmp_path / "images", "--image_size", 31, "--recipe", "tiny",
                  "--batch_size", 16, "--max_steps", 4, "--out_dir", tmp_path / "run")
    assert "U has 199 images, a fraction of 0.3 sensitive (your estimate)" in trained.stdout
    assert "mirrored" not in trained.stdout
    run("sample.py", "--device", "cpu", "--ckpt", tmp_path / "run" / "ckpt.pt", "--n", 1,
        "--steps", 2, "--grid", tmp_path / "g.png")
    image = Image.open(tmp_path / "g.png")
    assert image.size == (31, 31) and image.mode == "RGB"


def test_preview(tmp_path):
    path = tmp_path / "new" / "p.png"
    printed = run("data.py", "--prior", "1/11", "--preview", path).stdout
    assert "U has 27,500, S has 2,500; 4,926 normal test images" in printed
    assert "in U: 2,500, which is 0.09091 of it" in printed
    picture, s = load_png(path), MNIST.train[split("mnist", MNIST, prior=1 / 11)[1]]
    assert picture.shape == (1, 8 * 29 - 1, 2 * (8 * 29 - 1) + 12)
    for left, of_s in [(0, False), (8 * 29 - 1 + 12, True)]:
        assert (s == picture[:, :28, left:left + 28]).flatten(1).all(1).any() == of_s
    refused("list_attr_celeba.txt", "data.py", "--dataset", "celeba", "--data_dir", tmp_path,
            "--preview", path)


def test_preview_of_a_folder_shows_what_to_count(tmp_path):
    make_folder(tmp_path)
    printed = run("data.py", "--dataset", "folder", "--data_dir", tmp_path,
                  "--preview", tmp_path / "p.png").stdout
    assert "200 random images of U" in printed and "divided by 200" in printed
    picture, first = load_png(tmp_path / "p.png"), load("folder", tmp_path).train[:200]
    assert picture.shape == (3, 14 * 109 - 1, 15 * 97 - 1)
    assert not torch.equal(picture, grid(numbered(first)))    # in random order


def test_digest_tells_images_apart():
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    other = images.clone()
    other[4, 0, 1, 1] = 1
    assert data.digest(images) == data.digest(images.clone()) != data.digest(other)
