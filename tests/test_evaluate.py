"""Rate and FID against closed forms and constants of SciPy; the command on real images."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, arrows, pixels, refused, run, write
from PIL import Image

import classifier
import data
import evaluate
import sample
from evaluate import classes_and_features, compare, frechet_distance, load_judge, with_interval

CPU = torch.device("cpu")
JUDGE = ROOT / "data" / "mnist" / "classifier_28x1.pt"


@pytest.fixture(scope="module")
def mnist():
    return data.load("mnist")


@pytest.fixture
def few(mnist, monkeypatch):
    """Lets the command use 2,000 test images in place of 10,000."""
    part = data.Images(mnist.train, mnist.train_labels, mnist.test[:2000], mnist.test_labels[:2000])
    monkeypatch.setattr(data, "load", lambda *_: part)


def figures_of(*flags):
    """Runs the command -> the figures of its last line."""
    return json.loads(run("evaluate.py", "--device", "cpu", *flags).stdout.splitlines()[-1])


@pytest.mark.parametrize("successes, n", [(50, 100), (1, 30), (4990, 5000), (0, 10), (8, 8)])
def test_both_ends_of_the_interval_are_1_96_standard_errors_away(successes, n):
    share, low, high = with_interval("x", successes, n).values()
    assert low <= share == successes / n <= high and low < high
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.959964 ** 2 * p * (1 - p) / n, abs=1e-12)


def with_moments(mean, root, n=50):
    """Returns n rows that have exactly this mean, and the covariance root root^T."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(n, len(mean), dtype=torch.float64, generator=generator)
    white = torch.linalg.qr(white - white.mean(0)).Q * (n - 1) ** 0.5
    return white @ root.T + mean


def test_frechet_distance_of_gaussians_in_closed_form():
    """Two variables: tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    A, B = torch.tensor([[[2.0, 0.5], [0.5, 1]], [[1, -0.8], [-0.8, 3]]], dtype=torch.float64)
    f = with_moments(torch.tensor([1, -2.5]), torch.linalg.cholesky(A))
    g = with_moments(torch.zeros(2), torch.linalg.cholesky(B), n=70)
    for x, rel in [(f, 1e-12), (f[:2], 1e-6)]:    # the covariance of two rows is singular
        A, mean = x.T.cov(), x.mean(0)
        root_trace = ((A @ B).trace() + 2 * (A @ B).det().clamp(min=0).sqrt()).sqrt()
        expected = float(mean @ mean + A.trace() + B.trace() - 2 * root_trace)
        assert frechet_distance(x, g) == pytest.approx(expected, rel=rel)
        assert frechet_distance(g, x) == pytest.approx(expected, rel=rel)
    assert frechet_distance(f, f) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_distance_without_a_network_orders_real_images(name):
    """Normal images < half of them sensitive < all; and < blurred, < noisy, < ten repeated."""
    if name != "mnist" and "PU_DATA" not in os.environ:
        pytest.skip("needs real data: set PU_DATA")

    def distance(images):
        return frechet_distance(*map(evaluate.cell_features, (images, reference)))

    real = data.load(name, Path(os.environ.get("PU_DATA", data.DATA_DIR)))
    is_sensitive = data.has_class(real.train_labels, data.parse_classes(name))
    sensitive = real.train[is_sensitive][:200]
    reference, other, x = real.train[~is_sensitive][:600].split(200)
    noise = 60 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    floor, mix = max(distance(other), distance(x)), distance(torch.cat([x[:100], sensitive[:100]]))
    assert 1.5 * floor < mix < distance(sensitive) / 1.5
    for worse in [x + noise, F.avg_pool2d(x.float(), 3, 1, 1), x[:10].repeat(20, 1, 1, 1)]:
        assert distance(worse.clamp(0, 255).to(torch.uint8)) > 1.3 * floor


def test_the_judge_in_the_repository_belongs_to_this_code_and_is_good(mnist, monkeypatch):
    monkeypatch.setattr(evaluate, "train_classifier", None)    # it must not be needed
    judge, accuracy = load_judge(mnist, False, JUDGE, CPU)
    classes, _ = classes_and_features(judge, mnist.test[:2000])
    assert accuracy > 0.994 and (classes == mnist.test_labels[:2000]).float().mean() > 0.99


def toy(several=False):
    """Returns 8x8 images, bright above (class 1) or not (0), and below (2, one of several)."""
    generator = torch.Generator().manual_seed(0)
    above, below = (torch.rand(600, generator=generator) < 0.5 for _ in range(2))
    images = torch.randint(100, (600, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[above, :, :4] += 100
    images[below, :, 4:] += 100
    labels = torch.stack([~above, above, below], dim=1) if several else above.long()
    return data.Images(images[:400], labels[:400], images[400:], labels[400:])


def test_a_judge_is_trained_kept_and_trained_again_where_needed(tmp_path, monkeypatch):
    calls, cache, toys, train = [], tmp_path / "new" / "judge.pt", toy(), evaluate.train_classifier
    monkeypatch.setattr(evaluate, "train_classifier",
                        lambda *args, **flags: calls.append(args) or train(*args, **flags))
    (first, accuracy), (again, same) = (load_judge(toys, False, cache, CPU) for _ in range(2))
    assert len(calls) == 1 and same == accuracy > 0.98
    assert torch.equal(*(classes_and_features(judge, toys.test)[1] for judge in (first, again)))
    toys.train[0, 0, 0, 0] += 1    # one pixel
    load_judge(toys, False, cache, CPU)
    assert len(calls) == 2
    raw = bytearray(cache.read_bytes())
    raw[len(raw) // 2] ^= 64    # in a weight
    cache.write_bytes(raw)
    load_judge(toys, False, cache, CPU)
    load_judge(toys, True, Path("/proc/new/judge.pt"), CPU)    # cannot be kept there
    load_judge(toys, False, cache, CPU)
    assert len(calls) == 4


def test_real_images(mnist, few, tmp_path):
    """Five even digits as PNGs among fifteen odd ones as JPEGs, and 1,000 even ones."""
    odd = mnist.train_labels % 2 == 1
    of_digits = ["--dataset", "mnist", "--out_dir", tmp_path, "--images"]
    flags = [*of_digits, write(mnist.train[~odd][:5], tmp_path / "mix")]
    for i, image in enumerate(mnist.train[odd][:15, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / "mix" / f"{i}.jpg", quality=95)
    mix = figures_of(*flags)
    assert mix["rate"] == 0.25 and mix["n"] == sum(mix["classes"]) == 20
    frames = [pixels(tmp_path / "evaluation.png")[33 * (i // 5), 33 * (i % 5)] for i in range(20)]
    assert sum(frame.tolist() == [255, 0, 0] for frame in frames) == 15
    assert figures_of(*flags, "--sensitive", "even")["rate"] == 0.75
    normal = figures_of(*of_digits, write(mnist.train[~odd][:1000], tmp_path / "normal"))
    assert normal["rate"] > 0.99 and normal["classifier_accuracy"] >= 0.993
    assert 0 < normal["fid"] < 2 * normal["fid_floor"] < min(mix["fid"], mix["fid_floor"]) / 5
    judge, _ = load_judge(mnist, False, JUDGE, CPU)
    truth = mnist.test_labels[:2000] % 2
    wrong = (classes_and_features(judge, mnist.test[:2000])[0] % 2 != truth).float()
    for name, kind in [("false_alarms", 0), ("misses", 1)]:
        assert normal[name] == pytest.approx(wrong[truth == kind].mean().item())
    assert normal["false_alarms"] != normal["misses"] and wrong.mean() < 0.01


def test_images_with_several_labels(tmp_path, monkeypatch):
    toys = toy(several=True)
    truth = toys.test_labels[:, 1].float().mean().item()
    monkeypatch.setattr(data, "load", lambda *_: toys)
    (tmp_path / "celeba").mkdir()
    figures = figures_of("--images", write(toys.test, tmp_path / "pngs"), "--dataset", "celeba",
                         "--sensitive", 1, "--data_dir", tmp_path, "--out_dir", tmp_path)
    assert figures["rate"] == pytest.approx(1 - truth, abs=0.02)
    assert figures["sensitive"] == [1] and sum(figures["classes"]) == 200
    assert figures["misses"] < 0.03 and figures["false_alarms"] < 0.03
    assert (tmp_path / "celeba" / "classifier_8x1.pt").exists()


def test_a_checkpoint_and_the_images_sampled_from_it_are_measured_alike(small_run, few, tmp_path):
    flags = ["--n", 9, "--steps", 2, "--batch_size", 4, "--seed", 5, "--dtype", "float32"]
    (tmp_path / "run").mkdir()
    ckpt, saved = tmp_path / "run" / "ckpt.pt", torch.load(small_run[0] / "ckpt.pt")
    saved["args"]["sensitive"] = "4,7"    # what it was trained with is what counts
    torch.save(saved, ckpt)
    figures = figures_of("--ckpt", ckpt, *flags)
    assert pixels(tmp_path / "run" / "evaluation.png").shape == (3 * 33 - 1, 3 * 33 - 1, 3)
    assert figures["train_steps"] == 30 and figures["prior"] == figures["loss_prior"] == 0.5
    run("sample.py", "--ckpt", ckpt, *flags, "--device", "cpu", "--out_dir", tmp_path / "pngs")
    same = figures_of("--images", tmp_path / "pngs", "--dataset", "mnist", "--seed", 5,
                      "--sensitive", "4,7", "--out_dir", tmp_path)
    for key in ["rate", "rate_low", "fid", "fid_floor", "classes"]:
        assert figures[key] == same[key]


def test_real_images_are_exported_for_other_tools(mnist, tmp_path):
    flags = ["evaluate.py", "--export_real", tmp_path / "real", "--dataset", "mnist",
             "--sensitive", "even,3,5,7,9"]
    run(*flags)
    ones = evaluate.read_images(tmp_path / "real", 1, 28)
    assert torch.equal(ones, mnist.test[mnist.test_labels == 1])
    refused("already holds PNGs", *flags)


def test_what_cannot_be_evaluated_is_refused(small_run, few, mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw", None)    # refused before sampling
    ckpt = ["evaluate.py", "--ckpt", small_run[0] / "ckpt.pt"]
    refused("is not what", *ckpt, "--dataset", "cifar10")
    assert run(*ckpt, "--out_dir", "/proc", check=False).returncode == 1    # it is read-only
    folder = write(mnist.test[:3], tmp_path / "pngs")
    flags = ["evaluate.py", "--images", folder, "--out_dir", tmp_path, "--dataset", "mnist"]
    refused("--dataset is needed", *flags[:-2])
    Image.new("L", (32, 28)).save(folder / "wide.png")
    refused("wide.png has 32x28 pixels, the data set has 28x28", *flags)
    (folder / "half.png").write_bytes((folder / "00001.png").read_bytes()[:90])
    refused("half.png", *flags)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes a user's data, where arrows to the left are sensitive. Returns the flags, and a list
    to which each training, of only 20 steps, adds its hflip."""
    fit, mirrored = classifier.fit, []
    monkeypatch.setattr(classifier, "fit", lambda *args, **name: mirrored.append(args[4]) or fit(
        *args[:5], 20, *args[6:], **name))
    torch.manual_seed(0)
    for name, n, n_left in [("unlabeled", 80, 20), ("sensitive", 40, 40), ("normal_test", 60, 0)]:
        write(arrows(n, n_left), tmp_path / name)
    flags = ["--data_dir", tmp_path, "--image_size", 16, "--out_dir", tmp_path]
    return ["--dataset", "folder", *flags], mirrored


def test_images_beside_a_folder(folder, tmp_path):
    flags, mirrored = folder
    images = write(torch.cat([arrows(30, 0), arrows(30, 30)]), tmp_path / "images")
    rows = figures_of(*flags, "--images", images)["groups"]
    assert {name: (row["n"], row["like_s"]) for name, row in rows.items()} == dict(
        images=(60, 0.5), unlabeled=(80, 0.25), sensitive=(40, 1), normal_test=(60, 0))
    assert rows["images"]["like_s_low"] < 0.5 < rows["images"]["like_s_high"]
    assert rows["normal_test"]["distance"] < rows["unlabeled"]["distance"]
    # of 30 images at a time, each time of both kinds, though the first 30 by name are normal
    assert rows["unlabeled"]["distance"] < rows["images"]["distance"]
    shown = pixels(tmp_path / "evaluation.png")[::21, ::21].reshape(-1, 3)[:60]
    red = [frame.tolist() == [255, 0, 0] for frame in shown]    # like S: first, framed
    assert red == 30 * [True] + 30 * [False] and mirrored == 4 * [False]


def test_a_checkpoint_brings_its_folder_its_size_and_its_mirroring(folder, small_run, tmp_path):
    ckpt = torch.load(small_run[0] / "ckpt.pt")
    ckpt["args"] |= dict(dataset="folder", data_dir=str(tmp_path), hflip=True)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    rows = figures_of("--ckpt", tmp_path / "ckpt.pt", "--n", 4, "--steps", 2)["groups"]
    assert rows["images"]["n"] == 4 and rows["unlabeled"]["n"] == 80 and folder[1] == 4 * [True]
    assert pixels(tmp_path / "evaluation.png").shape == (2 * 33 - 1, 2 * 33 - 1, 3)


def test_without_normal_images_less_is_measured(folder, tmp_path):
    shutil.rmtree(tmp_path / "normal_test")
    images = arrows(30, 0)
    images[7] = torch.tensor(pixels(tmp_path / "sensitive" / "00003.png"))
    flags = [*folder[0], "--images", write(images, tmp_path / "images")]
    rows = figures_of(*flags)["groups"]
    assert rows["unlabeled"].keys() == rows["images"].keys() == {"n", "distance"}
    shown = pixels(tmp_path / "evaluation.png")[2:18, 2:18, 0]    # the nearest to S comes first
    assert np.array_equal(shown, images[7, 0])
    loaded = data.load("folder", tmp_path, 16)    # U has 80 images, so n is 40
    a, b = torch.randint(256, (40, 3, 16, 16)).byte(), torch.zeros(40, 3, 16, 16).byte()
    first, second, both = (compare(x, loaded, False, 0, CPU)[0]["images"]["distance"]
                           for x in (a, b, torch.cat([a, b])))
    assert both == pytest.approx((first + second) / 2)
    for path in sorted((tmp_path / "unlabeled").iterdir())[3:]:
        path.unlink()
    (tmp_path / "images" / "00000.png").write_text("which is not read any more")
    refused("needs 4", "evaluate.py", *flags)
