"""Rate and FID against closed forms and constants of SciPy; the command on real images."""
import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused, run
from PIL import Image

import classifier
import data
import evaluate
from evaluate import frechet_distance, judge, load_judge, train_judge, wilson
from images import save_png

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mnist():
    return data.load("mnist")


@pytest.fixture
def few(mnist, monkeypatch):
    """Lets the command judge 2,000 test images in place of 10,000."""
    images = data.Images(mnist.train, mnist.train_labels, mnist.test[:2000],
                         mnist.test_labels[:2000])
    monkeypatch.setattr(data, "load", lambda *_: images)


def figures_of(*flags):
    """Runs the command. Returns the figures of its last line, and all that it printed."""
    printed = run("evaluate.py", "--device", "cpu", *flags).stdout
    return json.loads(printed.splitlines()[-1]), printed


def write(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        save_png(image, folder / f"{i:05d}.png")
    return folder


# -----------------------------------------------------------------------------
# the interval

@pytest.mark.parametrize("successes, n", [(50, 100), (1, 30), (4990, 5000), (7, 8)])
def test_both_ends_of_the_interval_are_1_96_standard_errors_away(successes, n):
    for p in wilson(successes, n):
        standard_error = (p * (1 - p) / n) ** 0.5
        assert abs(successes / n - p) == pytest.approx(1.959964 * standard_error, rel=1e-9)
    low, high = wilson(successes, n)
    assert low < successes / n < high


def test_the_interval_where_all_or_none_succeed():
    z_squared = 1.959964 ** 2
    assert wilson(0, 10) == pytest.approx((0, z_squared / (10 + z_squared)))
    assert wilson(10, 10) == pytest.approx((10 / (10 + z_squared), 1))


# -----------------------------------------------------------------------------
# FID

def with_moments(mean, root, n=50):
    """Returns n rows that have exactly this mean, and the covariance root root^T."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(n, len(mean), dtype=torch.float64, generator=generator)
    white = torch.linalg.qr(white - white.mean(0)).Q * (n - 1) ** 0.5
    return white @ root.T + mean


def test_frechet_distance_of_gaussians_in_closed_form():
    mean, a, b = torch.tensor([[1, -2, 0.5, 3], [2, 0.3, 1, 0.1], [1, 4, 0.2, 0.7]]).double()
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    f = with_moments(mean, rotation @ a.diag())    # commuting covariances:
    g = with_moments(torch.zeros(4).double(), rotation @ b.diag(), n=70)
    expected = mean.square().sum() + (a - b).square().sum()    # |mean difference|^2 + sum (a - b)^2
    assert frechet_distance(f, g) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(g, f) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(f, f) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(f, f + 2) == pytest.approx(16, rel=1e-12)


def test_frechet_distance_where_covariances_do_not_commute():
    """Two variables: tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    A, B = torch.tensor([[[2.0, 0.5], [0.5, 1]], [[1, -0.8], [-0.8, 3]]], dtype=torch.float64)
    zero = torch.zeros(2).double()
    f, g = (with_moments(zero, torch.linalg.cholesky(cov)) for cov in (A, B))
    expected = A.trace() + B.trace() - 2 * ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt()
    assert frechet_distance(f, g) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_against_scipy():
    """The constants are by numpy.cov and scipy.linalg.sqrtm of SciPy 1.17.1.
    The covariance of 5 rows is singular."""
    i, j = np.arange(40)[:, None], np.arange(6)[None]
    f = torch.from_numpy(np.sin(1.3 * i + 0.7 * j * j) + 0.2 * j)
    g = torch.from_numpy(np.cos(0.9 * i * (j + 1)) * (1 + 0.3 * j) - 0.1 * i / 40)
    assert frechet_distance(f, g) == pytest.approx(11.005605373843597, rel=1e-6)
    assert frechet_distance(f[:5], g) == pytest.approx(11.097910762763528, rel=1e-6)
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(f[:1], g)


# -----------------------------------------------------------------------------
# the judge

def test_the_judge_in_the_repository_belongs_to_this_code_and_is_good(mnist, monkeypatch):
    cache = ROOT / "data" / "mnist" / "classifier_28x1.pt"
    monkeypatch.setattr(evaluate, "train_judge", None)    # it must not be needed
    trained, accuracy = load_judge(mnist, False, cache, CPU)
    classes, _ = judge(trained, mnist.test)
    assert accuracy == pytest.approx(float((classes == mnist.test_labels).float().mean()), abs=2e-4)
    assert accuracy >= 0.993


def toy(several):
    """Returns 8x8 images that are bright above (class 1) or not (class 0). several: images that
    are bright below are of class 2 as well."""
    generator = torch.Generator().manual_seed(0)
    above, below = (torch.rand(600, generator=generator) < 0.5 for _ in range(2))
    images = torch.randint(100, (600, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[above, :, :4] += 100
    images[below, :, 4:] += 100
    labels = torch.stack([~above, above, below], dim=1) if several else above.long()
    return data.Images(images[:400], labels[:400], images[400:], labels[400:])


@pytest.mark.parametrize("several", [False, True])
def test_a_judge_is_trained_kept_and_trained_again_where_needed(tmp_path, monkeypatch, several):
    calls, cache, toys = [], tmp_path / "classifier.pt", toy(several)

    def counted(*args):    # trains the first
        calls.append(args)
        return train_judge(*args) if len(calls) == 1 else copy.deepcopy(first)

    monkeypatch.setattr(evaluate, "train_judge", counted)
    first, accuracy = load_judge(toys, False, cache, CPU)
    classes, features = judge(first, toys.test, several)
    assert accuracy == (classes == toys.test_labels).float().mean() > 0.98
    assert features.dtype == torch.float64
    again, accuracy_again = load_judge(toys, False, cache, CPU)
    assert len(calls) == 1 and accuracy_again == accuracy
    assert torch.equal(judge(again, toys.test, several)[1], features)
    toys.train[0, 0, 0, 0] += 1    # one pixel
    load_judge(toys, False, cache, CPU)
    assert len(calls) == 2
    load_judge(toys, True, cache, CPU)    # another way to train
    assert len(calls) == 3
    raw = bytearray(cache.read_bytes())
    raw[len(raw) // 2] ^= 64    # in a weight
    cache.write_bytes(raw)
    load_judge(toys, True, cache, CPU)
    assert len(calls) == 4
    load_judge(toys, True, tmp_path / "nowhere" / "classifier.pt", CPU)    # cannot be kept there
    assert len(calls) == 5
    load_judge(toys, True, cache, CPU)
    assert len(calls) == 5
    monkeypatch.setattr(evaluate, "JUDGE_VERSION", evaluate.JUDGE_VERSION + 1)
    load_judge(toys, True, cache, CPU)
    assert len(calls) == 6


# -----------------------------------------------------------------------------
# the command

def test_real_images(mnist, few, tmp_path):
    """Judges 1,000 normal training images, 1,000 sensitive ones, and a mix of both halves."""
    some = torch.randperm(60000, generator=torch.Generator().manual_seed(1))
    odd = mnist.train_labels[some] % 2 == 1
    normal, sensitive = mnist.train[some[~odd][:1000]], mnist.train[some[odd][:1000]]
    mix = torch.stack([normal[:500], sensitive[:500]], dim=1).flatten(0, 1)    # alternating
    figures = {}
    for name, images in {"normal": normal, "sensitive": sensitive, "mix": mix}.items():
        folder = write(images, tmp_path / name)
        figures[name], printed = figures_of("--images", folder, "--out_dir", tmp_path)
        assert figures[name]["n"] == sum(figures[name]["classes"]) == 1000
    normal, sensitive, mix = figures.values()
    assert normal["rate"] > 0.99 and sensitive["rate"] < 0.01 and abs(mix["rate"] - 0.5) < 0.01
    assert mix["rate_low"] < mix["rate"] < mix["rate_high"] < mix["rate_low"] + 0.07
    assert 0 < normal["fid"] < 2 * normal["fid_floor"] < mix["fid"] / 5 < sensitive["fid"] / 10
    assert normal["classifier_accuracy"] >= 0.993
    assert normal["false_alarms"] < 0.01 and normal["misses"] < 0.01
    assert f"non-sensitive rate  {mix['rate']:.4f}, 95 % interval" in printed
    assert "not Inception" in printed

    # the picture of the mix: every other image is framed
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "evaluation.png")))
    assert grid.shape == (10 * 33 - 1, 10 * 33 - 1, 3)
    edges = [grid[r * 33, c * 33:][:32] for r in range(10) for c in range(10)]
    red = [bool((edge == torch.tensor([255, 0, 0])).all()) for edge in edges]
    assert sum(is_red != (i % 2 == 1) for i, is_red in enumerate(red)) <= 2    # the judge may err

    other, _ = figures_of("--images", tmp_path / "mix", "--sensitive", "even",
                          "--out_dir", tmp_path)
    assert other["rate"] == pytest.approx(1 - mix["rate"])


def test_images_with_several_labels(tmp_path, monkeypatch):
    toys = toy(several=True)
    monkeypatch.setattr(data, "load", lambda *_: toys)
    write(toys.test, tmp_path / "pngs")
    (tmp_path / "celeba").mkdir()
    figures, printed = figures_of("--images", tmp_path / "pngs", "--dataset", "celeba",
                                  "--sensitive", "arched_eyebrows",    # class 1
                                  "--data_dir", tmp_path, "--out_dir", tmp_path)
    truth = toys.test_labels.float().mean(0)
    assert figures["rate"] == pytest.approx(1 - float(truth[1]), abs=0.02)
    assert figures["sensitive"] == [1]
    assert [n / 200 for n in figures["classes"]] == pytest.approx(truth.tolist(), abs=0.02)
    assert figures["misses"] < 0.03 and figures["false_alarms"] < 0.03
    assert (tmp_path / "celeba" / "classifier_8x1.pt").exists()


def test_a_checkpoint_and_the_images_sampled_from_it_are_judged_alike(small_run, few, tmp_path):
    flags = ["--n", 9, "--steps", 2, "--batch_size", 4, "--seed", 5, "--dtype", "float32"]
    shutil.copytree(small_run[0], tmp_path / "run")
    ckpt = tmp_path / "run" / "ckpt.pt"
    figures, _ = figures_of("--ckpt", ckpt, *flags)
    assert Image.open(tmp_path / "run" / "evaluation.png").size == (3 * 33 - 1, 3 * 33 - 1)
    assert figures["algorithm"] == "pu" and figures["prior"] == figures["loss_prior"] == 0.5
    assert figures["train_steps"] == 30 and figures["train_seconds"] > 0
    assert figures["sensitive"] == [1, 3, 5, 7, 9] and figures["n"] == 9
    assert figures.keys() == set(
        "dataset sensitive algorithm prior n_labeled model init_from dtype loss_prior train_seed "
        "train_steps train_seconds n sampler steps sampling_dtype seed rate rate_low rate_high fid "
        "fid_floor classes classifier_accuracy false_alarms misses".split())
    run("sample.py", "--ckpt", ckpt, *flags, "--device", "cpu", "--out_dir", tmp_path / "pngs")
    same, _ = figures_of("--images", tmp_path / "pngs", "--seed", 5, "--out_dir", tmp_path)
    for key in ["rate", "rate_low", "fid", "fid_floor", "classes"]:
        assert figures[key] == same[key]


def test_real_images_are_exported_for_other_tools(mnist, tmp_path):
    run("evaluate.py", "--export_real", tmp_path / "real", "--sensitive", "even,3,5,7,9")
    ones = evaluate.read_images(tmp_path / "real", 1, 28)
    assert torch.equal(ones, mnist.test[mnist.test_labels == 1])
    refused(2, "already holds PNGs", "evaluate.py", "--export_real", tmp_path / "real")
    colour = evaluate.read_images(tmp_path / "real", 3, 28)
    assert torch.equal(colour, ones.expand(-1, 3, -1, -1))


def test_images_that_cannot_be_judged(mnist, few, tmp_path):
    flags = ["evaluate.py", "--images", tmp_path / "pngs", "--out_dir", tmp_path]
    write(mnist.test[:3], tmp_path / "pngs")
    Image.new("L", (32, 28)).save(tmp_path / "pngs" / "wide.png")
    refused(1, "wide.png has 32x28 pixels, the data set has 28x28", *flags)
    half = (tmp_path / "pngs" / "00001.png").read_bytes()[:90]
    (tmp_path / "pngs" / "half.png").write_bytes(half)
    refused(1, "half.png cannot be read as an image", *flags)
    for path in (tmp_path / "pngs").iterdir():
        path.unlink()
    refused(1, "pngs holds 0 PNGs: FID needs at least two", *flags)
    write(mnist.test[:1], tmp_path / "pngs" / "one")
    refused(1, "one holds 1 PNGs: FID needs at least two", "evaluate.py", "--images",
            tmp_path / "pngs" / "one", "--out_dir", tmp_path)
    (tmp_path / "evaluation.png").mkdir()    # none was written yet, and now none can be
    for i in range(2):    # 128, in 16 bits
        Image.fromarray(np.full((28, 28), 32896, np.uint16)).save(tmp_path / "pngs" / f"{i}.png")
    assert (evaluate.read_images(tmp_path / "pngs", 1, 28) == 128).all()
    result = run(*flags, check=False)    # first, the figures are printed
    assert json.loads(result.stdout.splitlines()[-1])["n"] == 2
    assert "evaluation.png cannot be written: Is a directory" in result.stderr


def test_bad_command_lines(small_run, few, tmp_path, monkeypatch):
    ckpt = small_run[0] / "ckpt.pt"
    refused(2, "one of the arguments --ckpt --images --export_real is required", "evaluate.py")
    refused(2, "not allowed with", "evaluate.py", "--ckpt", ckpt, "--images", tmp_path)
    refused(2, "is not what", "evaluate.py", "--ckpt", ckpt, "--dataset", "cifar10")
    refused(2, "steps must be 1 to 1000, not 1001", "evaluate.py", "--ckpt", ckpt, "--steps", 1001)
    refused(2, "--n: 0 is not a positive", "evaluate.py", "--ckpt", ckpt, "--n", 0)
    refused(2, "FID needs at least two images", "evaluate.py", "--ckpt", ckpt, "--n", 1)
    refused(1, "does not exist", "evaluate.py", "--ckpt", tmp_path / "ckpt.pt")
    monkeypatch.setattr(data, "load", lambda *_: toy(several=False))
    refused(2, "draws other images than --image_size", "evaluate.py", "--ckpt", ckpt)


# -----------------------------------------------------------------------------
# your own images, without labels

@pytest.fixture(scope="module")
def digits(mnist):
    """Returns small digits, [N, 1, 14, 14] uint8: even ones and odd ones, in random order."""
    some = torch.randperm(60000, generator=torch.Generator().manual_seed(2))[:6000]
    small = F.avg_pool2d(mnist.train[some].float(), 2).round().to(torch.uint8)
    odd = mnist.train_labels[some] % 2 == 1
    return small[~odd], small[odd]


@pytest.fixture
def folder(digits, tmp_path):
    """Writes a user's data: U, a quarter of it odd; 40 odd digits as S; 120 even ones."""
    even, odd = digits
    for name, images in {"unlabeled": torch.cat([even[:150], odd[:50]]),
                         "sensitive": odd[50:90], "normal_test": even[150:270]}.items():
        write(images, tmp_path / name)
    data.load("folder", tmp_path, 14, 1)    # decodes them: later, no progress is printed
    return ["--dataset", "folder", "--data_dir", tmp_path, "--image_size", 14, "--channels", 1,
            "--out_dir", tmp_path / "out"]


def distance(images, reference):
    return frechet_distance(evaluate.cell_features(images), evaluate.cell_features(reference))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_distance_orders_real_images(name):
    """Normal images < half of them sensitive < all; and < blurred, < noisy, < ten repeated."""
    if name != "mnist" and "PU_DATA" not in os.environ:
        pytest.skip("needs real data: set PU_DATA")
    real = data.load(name, Path(os.environ.get("PU_DATA", data.DATA_DIR)))
    classes = data.parse_classes(name, data.DATASETS[name]["sensitive"])
    is_sensitive = data.has_class(real.train_labels, classes)
    normal, sensitive = real.train[~is_sensitive][:800], real.train[is_sensitive][:200]
    reference, floor, x = normal.split([200, 200, 400])
    x = x[:200]
    noise = 60 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    floor = max(distance(floor, reference), distance(x, reference))
    mix = distance(torch.cat([x[:100], sensitive[:100]]), reference)
    assert 1.5 * floor < mix < distance(sensitive, reference) / 1.5
    for worse in [x + noise, F.avg_pool2d(x.float(), 3, 1, 1), x[:10].repeat(20, 1, 1, 1)]:
        assert distance(worse.clamp(0, 255).to(torch.uint8), reference) > 1.3 * floor


def test_no_image_is_judged_by_a_classifier_that_was_trained_on_it(monkeypatch):
    trained, judged = [], []

    def fit(images, normal, sensitive, *_, **__):
        assert all(images[normal] < 100) and all(images[sensitive] >= 100)
        trained.append(torch.cat([normal, sensitive]).tolist())

    def score(model, images, index):
        assert not set(index.tolist()) & set(trained[-1])
        judged.extend(index.tolist())
        return images[index].flatten().float()

    monkeypatch.setattr(evaluate, "fit", fit)
    monkeypatch.setattr(evaluate, "score", score)
    numbers = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    groups = {"images": numbers[:3], "normal_test": numbers[:30], "sensitive": numbers[100:105]}
    z = evaluate.score_like_s(groups, False, CPU)
    assert sorted(judged) == list(range(38)) and sorted(sum(trained, [])) == sorted(
        3 * list(range(3, 38)))
    for name, group in groups.items():
        assert torch.equal(z[name], group.flatten().float())


def test_real_images_beside_a_folder(folder, digits, tmp_path, monkeypatch):
    """Normal images look like normal_test/, and sensitive ones like S."""
    def short(*args, **flags):
        return fit(*args[:5], 60, *args[6:], **flags)    # steps

    fit = classifier.fit
    monkeypatch.setattr(classifier, "fit", short)
    even, odd = digits
    mix = torch.stack([even[300:350], odd[300:350]], dim=1).flatten(0, 1)    # alternating
    write(mix, tmp_path / "mix")
    figures, printed = figures_of(*folder, "--images", tmp_path / "mix")
    rows = figures["groups"]
    assert {name: row["n"] for name, row in rows.items()} == {
        "images": 100, "unlabeled": 200, "sensitive": 40, "normal_test": 120}
    false_alarms, found = rows["normal_test"]["like_s"], rows["sensitive"]["like_s"]
    assert false_alarms < 0.3 and found > 0.7
    for name, share in {"images": 0.5, "unlabeled": 0.25}.items():
        expected = share * found + (1 - share) * false_alarms
        assert rows[name]["like_s"] == pytest.approx(expected, abs=0.12)
        assert rows[name]["like_s_low"] < rows[name]["like_s"] < rows[name]["like_s_high"]
    assert rows["normal_test"]["distance"] < rows["unlabeled"]["distance"]
    assert rows["normal_test"]["distance"] < rows["images"]["distance"]
    assert "distance" not in rows["sensitive"]    # they are fewer than 60
    assert "Frechet distance to 60 of normal_test/" in printed
    assert f"images          100   {rows['images']['like_s']:.4f} (" in printed

    # the picture: those that look like S come first, framed
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "evaluation.png")))
    corners = [grid[r * 19, c * 19] for r in range(10) for c in range(10)]
    red = [corner.tolist() == [255, 0, 0] for corner in corners]
    assert red == sorted(red, reverse=True) and sum(red) == 100 * rows["images"]["like_s"]


def test_without_normal_images_less_is_said(folder, digits, tmp_path):
    shutil.rmtree(tmp_path / "normal_test")
    data.load("folder", tmp_path, 14, 1)
    refused(2, "normal_test holds no images to export", "evaluate.py", *folder,
            "--export_real", tmp_path / "real")
    even, odd = digits
    images = torch.cat([even[300:350], odd[60:61]])    # the last one is in S
    write(images, tmp_path / "images")
    figures, printed = figures_of(*folder, "--images", tmp_path / "images")
    assert figures["groups"].keys() == {"images", "unlabeled", "sensitive"}
    assert figures["groups"]["unlabeled"].keys() == {"n", "distance"}
    assert "look like S (" not in printed and "51 of unlabeled/" in printed
    grid = np.array(Image.open(tmp_path / "out" / "evaluation.png"))
    assert np.array_equal(grid[2:16, 2:16, 0], odd[60, 0])    # the nearest to S comes first
    assert (grid[:2, :18] == 255).all()    # no frame


def test_a_folder_that_cannot_be_judged(folder, tmp_path):
    flags = ["evaluate.py", *folder, "--images", tmp_path / "unlabeled"]
    refused(2, "a folder is split already", *flags, "--sensitive", "odd")
    for path in sorted((tmp_path / "normal_test").iterdir())[3:]:
        path.unlink()
    data.load("folder", tmp_path, 14, 1)
    refused(2, "S has 40 images and normal_test/ 3: both need at least 4", *flags)
    run("evaluate.py", *folder, "--export_real", tmp_path / "real")
    assert len(list((tmp_path / "real").iterdir())) == 3


def test_a_checkpoint_knows_its_folder(folder, small_run, tmp_path):
    shutil.rmtree(tmp_path / "normal_test")
    ckpt = torch.load(small_run[0] / "ckpt.pt", weights_only=True)
    ckpt["args"] |= dict(dataset="folder", data_dir=str(tmp_path), image_size=28, channels=1)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    figures, _ = figures_of("--ckpt", tmp_path / "ckpt.pt", "--n", 4, "--steps", 2)
    assert figures["dataset"] == "folder" and figures["groups"]["images"]["n"] == 4
    assert figures["groups"]["unlabeled"]["n"] == 8 and (tmp_path / "evaluation.png").exists()
