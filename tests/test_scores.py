"""Training on the images that --scores keeps; the scores are made by hand."""
import math

import pytest
import torch
from conftest import SMALL, overhear, refused, run

import data
from images import to_uint8

SETS = ["--n_unlabeled", 600, "--n_labeled", 100]    # what the scores are for


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Writes scores in a known order. A quarter of S scores lower than the median of U."""
    images = data.load("mnist")
    u, s, _ = data.split("mnist", images, prior=0.5, n_unlabeled=600, n_labeled=100)
    path = tmp_path_factory.mktemp("scores") / "scores.pt"
    torch.save(dict(u=u, s=s, z_u=torch.linspace(-3, 3, 600), z_s=torch.linspace(-1, 3, 100),
                    images=data.digest(images.train)), path)
    return path


def test_a_hard_cut_shows_the_loss_nothing_else(scores, tmp_path, monkeypatch):
    saved = torch.load(scores)
    images = data.load("mnist").train
    kept_u, kept_s = ({image.numpy().tobytes() for image in images[index]}
                      for index in [saved["u"][:300], saved["s"][saved["z_s"] < 0]])
    steps = overhear(monkeypatch, *SETS, "--batch_size", 100, "--scores", scores, "--keep", "0.5",
                     "--max_steps", 2, "--out_dir", tmp_path / "run")
    n_s = 24    # of the prior that is left, 0.25: a share of 0.2, rounded up to sixteenths
    for x_0, _, _ in steps:
        shown = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        assert set(shown[:100 - n_s]) <= kept_u and set(shown[100 - n_s:]) <= kept_s
        assert len(set(shown[:100 - n_s])) > 50
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["loss_prior"] == 0.5
    assert ckpt["loss_prior"] == pytest.approx(0.5 * 0.25 / 0.5)


@pytest.mark.parametrize("n_kept", [0, 1])
def test_too_little_of_s_is_refused_and_not_worked_around(scores, tmp_path, n_kept):
    """train.py never changes the objective silently: the user must choose."""
    saved = torch.load(scores)
    keep = ((saved["z_u"] < saved["z_s"][n_kept]).sum().item() - 0.5) / 600    # ceil is exact
    flags = ["train.py", *SMALL, *SETS, "--max_steps", 2, "--scores", scores, "--keep", keep]
    line = refused(2, f"leave {n_kept} images of S, fewer than the", *flags,
                   "--out_dir", tmp_path / "run")
    assert "Use --algorithm unsupervised, or a larger --keep" in line
    assert not (tmp_path / "run").exists()
    printed = run(*flags, "--algorithm", "unsupervised", "--out_dir", tmp_path / "run").stdout
    assert "minimise the ordinary diffusion loss, E_U[l], on 32 images of U a step" in printed
    assert f"and {n_kept} of S, by {scores}" in printed


def test_a_run_with_scores_can_be_resumed(scores, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, *SETS, "--max_steps", 2, "--scores", scores, "--loss_prior", 0.2]
    run("train.py", *flags, "--out_dir", folder)
    before = torch.load(folder / "ckpt.pt")["loss_prior"]
    for steps, again in [(3, flags), (4, [])]:    # the same flags as before, or none
        end = ["--resume", "--max_steps", steps, "--out_dir", folder]
        assert f"step {steps}/{steps}" in run("train.py", *again, *end).stdout
        assert torch.load(folder / "ckpt.pt")["loss_prior"] == before
    saved = torch.load(scores)
    torch.save(saved | dict(z_u=saved["z_u"].flip(0)), tmp_path / "other.pt")
    refused(1, f"{tmp_path / 'other.pt'} has changed", "train.py", "--scores",
            tmp_path / "other.pt", "--resume", "--max_steps", 5, "--out_dir", folder)
    n_kept = math.ceil(0.9 * (1 - 0.2) * 600)
    passed = (saved["z_s"] <= saved["z_u"][n_kept - 1]).float().mean().item()
    assert before == pytest.approx(0.2 * passed / (n_kept / 600))


def test_bad_scores_are_refused(scores, tmp_path):
    bad = tmp_path / "bad.pt"

    def train_refused(status, words, *flags):
        refused(status, words, "train.py", *SMALL, *SETS, "--max_steps", 1, *flags,
                "--out_dir", tmp_path / "run")

    train_refused(1, "bad.pt does not exist: pu_filter.py writes it", "--scores", bad)
    bad.write_text("garbage")
    train_refused(1, "bad.pt is not what pu_filter.py writes", "--scores", bad)
    train_refused(2, "is for other images", "--seed", 1, "--scores", scores)
    train_refused(2, "--keep needs --scores", "--keep", "0.5")
    train_refused(2, "--algorithm oracle needs the labels of U", "--scores", scores,
                  "--algorithm", "oracle")
    for damage, words in [({"images": ""}, "is for other images"),
                          ({"z_s": torch.full((100,), -9)}, "leave a prior of")]:
        torch.save({**torch.load(scores), **damage}, bad)
        train_refused(2, words, "--scores", bad)
    assert not (tmp_path / "run").exists()
