"""What train.py makes of the scores of pu_filter.py."""
import math

import pytest
import torch
from conftest import SMALL, overhear, refused, run

import data
from images import to_uint8

SETS = ["--n_unlabeled", 600, "--n_labeled", 100]    # what the scores are for


def test_a_hard_cut_shows_the_loss_nothing_else(scores, tmp_path, monkeypatch):
    saved = torch.load(scores[0])
    threshold = saved["z_u"].sort().values[299]
    images = data.load("mnist").train
    kept_u = images[saved["u"][saved["z_u"] <= threshold]]
    kept_s = images[saved["s"][saved["z_s"] <= threshold]]
    kept_u, kept_s = ({image.numpy().tobytes() for image in kept} for kept in (kept_u, kept_s))
    assert len(kept_u) == 300
    steps = overhear(monkeypatch, *SETS, "--batch_size", 400, "--sensitive_share", "0.5",
                     "--scores", scores[0], "--keep", "0.5", "--max_steps", 2,
                     "--out_dir", tmp_path / "run")
    for x_0, _, _ in steps:
        shown = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        assert set(shown[:200]) <= kept_u and set(shown[200:]) <= kept_s
        assert len(set(shown[:200])) > 100
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["loss_prior"] == 0.5
    passed = (saved["z_s"] <= threshold).float().mean().item()
    assert ckpt["loss_prior"] == pytest.approx(0.5 * passed / 0.5)


@pytest.mark.parametrize("n_kept", [0, 7])
def test_where_too_few_of_s_are_kept_nothing_is_pushed_away(scores, tmp_path, n_kept):
    saved = torch.load(scores[0])
    first_dropped = saved["z_s"].sort().values[n_kept]
    keep = (saved["z_u"] < first_dropped).sum().item() / 600
    flags = [*SMALL, *SETS, "--max_steps", 2, "--scores", scores[0], "--keep", keep]
    printed = run("train.py", *flags, "--out_dir", tmp_path / "pu").stdout
    assert f"of S, {n_kept}\n" in printed
    assert "32 of U and 0 of S a step (too few of S are left" in printed
    half = run("train.py", *flags, "--sensitive_share", "0.5", "--out_dir", tmp_path / "half")
    n_s = 16 if n_kept else 0
    assert f"{32 - n_s} of U and {n_s} of S a step" in half.stdout
    run("train.py", *flags, "--algorithm", "unsupervised", "--out_dir", tmp_path / "unsupervised")
    a, b = (torch.load(tmp_path / name / "ckpt.pt") for name in ["pu", "unsupervised"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    resumed = run("train.py", "--resume", "--max_steps", 3, "--out_dir", tmp_path / "pu")
    assert "step 3/3" in resumed.stdout


def test_a_run_with_scores_can_be_resumed(scores, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, *SETS, "--max_steps", 2, "--scores", scores[0], "--loss_prior", 0.2]
    run("train.py", *flags, "--out_dir", folder)
    before = torch.load(folder / "ckpt.pt")["loss_prior"]
    for steps, again in [(3, flags), (4, [])]:    # the same flags as before, or none
        end = ["--resume", "--max_steps", steps, "--out_dir", folder]
        assert f"step {steps}/{steps}" in run("train.py", *again, *end).stdout
        assert torch.load(folder / "ckpt.pt")["loss_prior"] == before
    saved = torch.load(scores[0])
    n_kept = math.ceil(0.9 * (1 - 0.2) * 600)
    threshold = saved["z_u"].sort().values[n_kept - 1]
    passed = (saved["z_s"] <= threshold).float().mean().item()
    assert before == pytest.approx(0.2 * passed / (n_kept / 600))


def test_bad_scores_are_refused(scores, tmp_path):
    bad, good = tmp_path / "bad.pt", scores[0]

    def train_refused(status, words, *flags):
        refused(status, words, "train.py", *SMALL, *SETS, "--max_steps", 1, *flags,
                "--out_dir", tmp_path / "run")

    train_refused(1, "bad.pt does not exist: pu_filter.py writes it", "--scores", bad)
    bad.write_text("garbage")
    train_refused(1, "bad.pt is not what pu_filter.py writes", "--scores", bad)
    train_refused(2, "is for other images", "--seed", 1, "--scores", good)
    train_refused(2, "--keep needs --scores", "--keep", "0.5")
    train_refused(2, "--scores and --algorithm oracle", "--scores", good, "--algorithm", "oracle")
    for damage, words in [({"images": ""}, "is for other images"),
                          ({"z_u": torch.arange(600), "z_s": torch.full((100,), -9)},
                           "leave a prior of")]:
        torch.save({**torch.load(good), **damage}, bad)
        train_refused(2, words, "--scores", bad)
    assert not (tmp_path / "run").exists()
