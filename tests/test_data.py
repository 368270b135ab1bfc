"""Default sizes of the data sets, splits counted to the image, and the preview command."""
import re

import pytest
import torch
from conftest import make_folder, refused, run
from PIL import Image

from data import DATASETS, Images, digest, known_prior, load, parse_classes, pu_split, split

MNIST = load("mnist")
ODD = [1, 3, 5, 7, 9]


def test_mnist_is_mnist():
    assert MNIST.train.shape == (60000, 1, 28, 28) and MNIST.test.shape == (10000, 1, 28, 28)
    assert MNIST.train.dtype == torch.uint8 and MNIST.train_labels.dtype == torch.int64
    assert MNIST.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert MNIST.train_labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert MNIST.train.double().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_unknown_data_set_lists_the_known():
    with pytest.raises(ValueError, match="unknown data set 'imagenet'.*mnist"):
        load("imagenet")


@pytest.mark.parametrize("text, classes", [
    ("odd", ODD), ("ODD", ODD), ("even", [0, 2, 4, 6, 8]), ("7", [7]), ("4, 7", [4, 7]),
    ("7,4,7", [4, 7]), ("even,1", [0, 1, 2, 4, 6, 8]),
])
def test_parse_classes(text, classes):
    assert parse_classes("mnist", text) == classes


@pytest.mark.parametrize("text, words", [
    ("10", "no class '10': choose among even, odd, 0, 1"), ("cat", "no class 'cat'"),
    ("", "no class ''"), ("1,,2", "no class ''"), ("-1", "no class '-1'"),
    ("odd,even", "every class of mnist is sensitive"), ("0,1,2,3,4,5,6,7,8,9", "every class"),
])
def test_parse_classes_refuses(text, words):
    with pytest.raises(ValueError, match=words):
        parse_classes("mnist", text)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("prior", [0.5, 1 / 11, 0.1, 0.01, 0.3333])
@pytest.mark.parametrize("sensitive", [ODD, [4], [0, 2, 4, 6, 8]])
def test_split_is_exact(seed, prior, sensitive):
    n_unlabeled, n_labeled = 5000, 2500
    u, s, test_normal = pu_split(MNIST, sensitive, prior, n_unlabeled, n_labeled, seed)
    sensitive = torch.tensor(sensitive)
    assert len(u) == n_unlabeled and len(s) == n_labeled
    assert torch.isin(MNIST.train_labels[u], sensitive).sum() == round(prior * n_unlabeled)
    assert torch.isin(MNIST.train_labels[s], sensitive).all()
    assert len(torch.cat([u, s]).unique()) == n_unlabeled + n_labeled    # disjoint, none twice
    labels = MNIST.test_labels.tolist()
    assert test_normal.tolist() == [i for i, y in enumerate(labels) if y not in sensitive]
    again = pu_split(MNIST, sensitive.tolist(), prior, n_unlabeled, n_labeled, seed)
    other = pu_split(MNIST, sensitive.tolist(), prior, n_unlabeled, n_labeled, seed + 1)
    assert torch.equal(u, again[0]) and torch.equal(s, again[1])
    assert not torch.equal(u, other[0]) and not torch.equal(s, other[1])


def test_the_papers_sizes():
    defaults = DATASETS["mnist"]
    assert (defaults["n_normal"], defaults["n_labeled"]) == (25000, 2500)
    sensitive = parse_classes("mnist", defaults["sensitive"])
    u, s, test_normal = pu_split(MNIST, sensitive, 1 / 11, 27500, defaults["n_labeled"])
    assert torch.isin(MNIST.train_labels[u], torch.tensor(ODD)).sum() == 2500
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
    words = "n_labeled = 50 is not possible: there are 50 sensitive images"
    with pytest.raises(ValueError, match=words):
        pu_split(data, [1], 0.5, 10, 50)
    with pytest.raises(ValueError, match="use a larger n_unlabeled"):
        pu_split(data, [1], 0.01, 10, 5)


def test_celeba_attributes_are_split_like_classes():
    labels = torch.zeros(100, 80, dtype=torch.bool)
    labels[:30, 20] = True
    labels[30:, 60] = True
    images = Images(None, labels, None, labels)
    u, s, test_normal = pu_split(images, [60], prior=0.5, n_unlabeled=40, n_labeled=20)
    assert labels[u, 60].sum() == 20 and labels[s, 60].all()
    assert len(test_normal) == 30 and len(torch.cat([u, s]).unique()) == 60


@pytest.mark.parametrize("name, normal, sensitive, counts", [
    ("cifar10", "vehicles", "animals", (20000, 2000)),
    ("stl10", "vehicles", "animals", (2000, 200)),
])
def test_both_directions(name, normal, sensitive, counts):
    defaults, classes = DATASETS[name], DATASETS[name]["classes"]
    assert defaults["sensitive"] == sensitive
    assert (defaults["n_normal"], defaults["n_labeled"]) == counts
    assert sorted(parse_classes(name, normal) + parse_classes(name, sensitive)) == list(range(10))
    assert [classes[i] for i in parse_classes(name, "vehicles")] == (
        ["airplane", "automobile" if name == "cifar10" else "car", "ship", "truck"])
    assert parse_classes(name, "Cat, 9") == sorted([classes.index("cat"), 9])


def test_a_folder_is_split_already(tmp_path):
    make_folder(tmp_path)
    images = load("folder", tmp_path)
    assert [len(index) for index in split("folder", images)] == [200, 50, 5]
    with pytest.raises(ValueError, match="a folder is split already"):
        split("folder", images, sensitive="cat")


def test_a_folder_is_trained_on_and_sampled(tmp_path):
    make_folder(tmp_path / "images", broken=[50])
    flags = ["--device", "cpu", "--dataset", "folder", "--data_dir", tmp_path / "images",
             "--prior", "0.3"]
    trained = run("train.py", *flags, "--model", "tiny", "--batch_size", 16, "--max_steps", 4,
                  "--out_dir", tmp_path / "run")
    words = "U has 199 images, a fraction of 0.3 sensitive (your estimate); S has 50"
    assert words in trained.stdout
    run("train.py", "--dataset", "folder", "--out_dir", tmp_path / "run", "--resume",
        "--max_steps", 5)    # --prior is known
    resume = ["train.py", "--out_dir", tmp_path / "run", "--resume", "--max_steps", 6]
    first = tmp_path / "images" / "unlabeled" / "a" / "0000.png"
    Image.open(first).rotate(180).save(first)
    for n_unlabeled in [199, 198]:    # another image, then none
        changed = run(*resume, check=False)
        assert changed.returncode == 1
        line = changed.stderr.splitlines()[-1]
        assert "the sizes and the checksum of U and S were [199, 50, '" in line
        assert f"now they are [{n_unlabeled}, 50, '" in line
        assert line.endswith(f"{tmp_path / 'images'} has changed")
        first.unlink(missing_ok=True)
    load("folder", tmp_path / "images", image_size=31)    # so that train.py has nothing to decode
    refused(2, "image size 31 cannot be halved evenly", "train.py", *flags, "--model", "paper",
            "--image_size", 31, "--out_dir", tmp_path / "other")
    run("sample.py", "--device", "cpu", "--ckpt", tmp_path / "run" / "ckpt.pt", "--n", 1,
        "--steps", 2, "--grid", tmp_path / "g.png")
    image = Image.open(tmp_path / "g.png")
    assert image.size == (32, 32) and image.mode == "RGB"


def test_the_prior_of_a_folder_is_counted_and_not_guessed(tmp_path):
    make_folder(tmp_path)
    flags = ["--dataset", "folder", "--data_dir", tmp_path]
    printed = run("data.py", *flags, "--preview", tmp_path / "p.png").stdout
    assert "p.png: 200 random images of U. Count the sensitive ones: --prior is" in printed
    assert "divided by 200. Its standard error is 0.035 at most" in printed
    assert Image.open(tmp_path / "p.png").size == (15 * 97 - 1, 14 * 109 - 1)
    for script in ["train.py", "pu_filter.py"]:
        for out_dir in [[], ["--out_dir", tmp_path / "run"]]:    # whose default names the prior
            words = "--dataset folder needs --prior, the fraction of sensitive images in unlabeled/"
            assert "count them among the 400" in refused(2, words, script, *flags, *out_dir)
    assert not (tmp_path / "run").exists()
    assert known_prior("mnist") == 0.5 and known_prior("folder", 0.1) == 0.1


def test_preview(tmp_path):
    flags = ["--dataset", "mnist", "--prior", "1/11", "--preview", tmp_path / "p.png"]
    printed = run("data.py", *flags).stdout
    assert "U has 27,500, S has 2,500; 4,926 normal test images" in printed
    assert "in U: 2,500, which is 0.09091 of it" in printed
    assert Image.open(tmp_path / "p.png").size == (2 * (8 * 29 - 1) + 12, 8 * 29 - 1)
    refused(2, "--dataset: invalid choice: 'x'", "data.py", "--dataset", "x")
    refused(1, "list_attr_celeba.txt", "data.py", "--dataset", "celeba", "--data_dir", tmp_path)


def test_digest_tells_images_apart():
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    other = images.clone()
    other[4, 0, 1, 1] = 1
    assert digest(images) == digest(images.clone()) != digest(other)
