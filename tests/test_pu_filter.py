"""The classifier's risk in closed form, cross-fitting, and what train.py makes of the scores."""
import math

import pytest
import torch
from conftest import SMALL, refused, run

import data
import pu_filter
from images import to_uint8
from pu_filter import cross_scores, distort, nnpu_loss
from test_train import overhear

CPU = torch.device("cpu")


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.8])
def test_on_a_literal_mixture_the_risk_is_the_one_with_all_labels(prior):
    """U = N + S: both classes' mean sigmoid losses, weighted one half."""
    torch.manual_seed(0)
    z_n, z_s = torch.randn(round(100 * (1 - prior)), dtype=torch.float64), torch.randn(round(100 * prior), dtype=torch.float64)
    expected = 0.5 * torch.sigmoid(-z_s).mean() + 0.5 * torch.sigmoid(z_n).mean()
    assert nnpu_loss(torch.cat([z_n, z_s]), z_s, prior).item() == pytest.approx(expected.item(), rel=1e-12)


def test_below_zero_it_descends_on_minus_the_difference_alone():
    z_u, z_s = torch.full((4,), -3.0, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)
    loss = nnpu_loss(z_u, z_s, 0.5)
    difference = (torch.sigmoid(z_u).mean() - 0.5 * torch.sigmoid(z_s).mean()) / 0.5
    assert difference < 0 and loss.item() == pytest.approx(-0.5 * difference.item())
    loss.backward()
    assert (z_u.grad < 0).all() and (z_s.grad > 0).all()


def test_distorted_images_stay_images_and_differ():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 12, 12) * 2 - 1
    y = distort(x, hflip=True)
    assert y.shape == x.shape and y.min() >= -1 - 1e-5 and y.max() <= 1 + 1e-5
    assert all((a != b).any() for a, b in zip(x, y))
    assert torch.equal(distort(torch.full((2, 1, 8, 8), -1.0), False), torch.full((2, 1, 8, 8), -1.0))    # black is black


def test_cross_fitting_finds_the_hidden_ones():
    """Bright above is sensitive."""
    generator = torch.Generator().manual_seed(0)
    is_sensitive = torch.rand(1200, generator=generator) < 0.5
    images = torch.randint(100, (1200, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[is_sensitive, :, :4] += 100
    s = is_sensitive.nonzero()[:200, 0]
    u = torch.tensor(sorted(set(range(1200)) - set(s.tolist())))
    torch.manual_seed(0)
    z_u, z_s = cross_scores(data.Images(images, None, None, None), u, s, 0.4, False, 40, CPU)
    assert ((z_u > 0) == is_sensitive[u]).float().mean() > 0.97 and (z_s > 0).float().mean() > 0.95


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Of real digits, by a very short training -> the file, and what was printed"""
    folder = tmp_path_factory.mktemp("filter")
    flags = ["--prior", "0.5", "--n_unlabeled", 600, "--n_labeled", 100, "--steps", 20, "--device", "cpu"]
    return folder / "scores.pt", run("pu_filter.py", *flags, "--out_dir", folder).stdout


def test_the_command_scores_real_digits(scores):
    path, printed = scores
    kept = torch.load(path)
    assert len(kept["z_u"]) == len(kept["u"]) == 600 and len(kept["z_s"]) == len(kept["s"]) == 100
    assert (path.parent / "dropped.png").stat().st_size > 1000
    rows = [list(map(float, line.split())) for line in printed.splitlines()[1:8]]
    mnist = data.load("mnist")
    odd = mnist.train_labels[kept["u"]] % 2 == 1
    order = kept["z_u"].argsort()
    for keep, by_s, by_labels, normal in rows:
        some = order[:round(keep * 600)]
        assert by_labels == pytest.approx(odd[some].float().mean().item(), abs=1e-4)
        assert normal == pytest.approx(((~odd[some]).sum() / 300).item(), abs=1e-4)
        assert by_s == pytest.approx(by_labels, abs=0.1)
    assert rows[4][2] < 0.4    # even 20 steps are better than chance


def shown(monkeypatch, tmp_path, path, *flags):
    steps = overhear(monkeypatch, "--n_unlabeled", 600, "--n_labeled", 100, "--batch_size", 400, "--sensitive_share", "0.5", "--scores", path, "--max_steps", 2,
                     *flags, "--out_dir", tmp_path / "run")
    return [to_uint8(x_0) for x_0, _, _ in steps]


def test_a_hard_cut_shows_the_loss_nothing_else(scores, tmp_path, monkeypatch):
    mnist, kept = data.load("mnist"), torch.load(scores[0])
    threshold = kept["z_u"].sort().values[299]
    U, S = ({image.numpy().tobytes() for image in mnist.train[kept[index][kept[z] <= threshold]]} for index, z in [("u", "z_u"), ("s", "z_s")])
    assert len(U) == 300
    for images in shown(monkeypatch, tmp_path, scores[0], "--keep", "0.5"):
        images = [image.contiguous().numpy().tobytes() for image in images]
        assert set(images[:200]) <= U and set(images[200:]) <= S and len(set(images[:200])) > 100
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["loss_prior"] == 0.5
    assert ckpt["loss_prior"] == pytest.approx(0.5 * (kept["z_s"] <= threshold).float().mean().item() / 0.5)


@pytest.mark.parametrize("prior", [0.2, 0.5])
def test_the_risk_of_what_is_kept_is_exact(prior):
    """U = N + S: with the prior of what is kept, the difference is the loss of the normal images that are kept."""
    torch.manual_seed(0)
    n, s = (torch.rand(round(1000 * share), 2, dtype=torch.float64) for share in [1 - prior, prior])    # columns: score, l
    u = torch.cat([n, s])
    mean = lambda x: x[x[:, 0] < 0.4, 1].mean()
    kept = lambda x: (x[:, 0] < 0.4).double().mean()
    left = prior * kept(s) / kept(u)
    assert ((mean(u) - left * mean(s)) / (1 - left)).item() == pytest.approx(mean(n).item(), rel=1e-12)


@pytest.mark.parametrize("n_kept", [0, 7])
def test_where_fewer_of_s_are_kept_than_a_step_takes_nothing_is_pushed_away(scores, tmp_path, n_kept):
    kept = torch.load(scores[0])
    keep = (kept["z_u"] < kept["z_s"].sort().values[n_kept]).sum().item() / 600    # all of U that scores below the first of S that is dropped
    some = [*SMALL, "--n_unlabeled", 600, "--n_labeled", 100, "--max_steps", 2, "--scores", scores[0], "--keep", keep]
    printed = run("train.py", *some, "--out_dir", tmp_path / "pu").stdout
    assert f"of S, {n_kept}\n" in printed and "32 of U and 0 of S a step (too few of S are left" in printed
    n_s = 16 if n_kept else 0
    assert f"{32 - n_s} of U and {n_s} of S a step" in run("train.py", *some, "--sensitive_share", "0.5", "--out_dir", tmp_path / "half").stdout
    run("train.py", *some, "--algorithm", "unsupervised", "--out_dir", tmp_path / "unsupervised")
    a, b = (torch.load(tmp_path / name / "ckpt.pt") for name in ["pu", "unsupervised"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert "step 3/3" in run("train.py", "--resume", "--max_steps", 3, "--out_dir", tmp_path / "pu").stdout


def test_the_default_is_a_classifier_first(tmp_path, monkeypatch):
    """train.py makes the scores that pu_filter.py would, and what else it draws at random does not depend on it."""
    flags = [*(flag for flag in SMALL if flag not in ("--scores", "none")), "--n_unlabeled", 600, "--n_labeled", 100, "--max_steps", 2]
    monkeypatch.setattr(pu_filter, "STEPS", 12)
    printed = run("train.py", *flags, "--out_dir", tmp_path / "run").stdout
    path = tmp_path / "run" / "scores.pt"
    assert f"whose scores go to {path}" in printed and "24 of U and 8 of S a step" in printed
    kept, before = torch.load(path), path.read_bytes()
    run("pu_filter.py", *flags[:4], "--n_unlabeled", 600, "--n_labeled", 100, "--steps", 12, "--device", "cpu", "--out_dir", tmp_path / "filter")
    again = torch.load(tmp_path / "filter" / "scores.pt")
    assert torch.equal(kept["z_u"], again["z_u"]) and torch.equal(kept["z_s"], again["z_s"])
    run("train.py", *flags, "--scores", path, "--out_dir", tmp_path / "same")
    a, b = (torch.load(tmp_path / name / "ckpt.pt") for name in ["run", "same"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert "step 3/3" in run("train.py", "--resume", "--max_steps", 3, "--out_dir", tmp_path / "run").stdout
    (tmp_path / "run" / "ckpt.pt").unlink()    # as if interrupted before the first checkpoint: made for this prior, the scores serve again
    refused(2, "scores.pt was made for a prior of 0.5 and --seed 0: delete it, or", "train.py", *flags, "--loss_prior", 0.4, "--out_dir", tmp_path / "run")
    assert "classifier first" not in run("train.py", *flags, "--out_dir", tmp_path / "run").stdout
    assert path.read_bytes() == before


def test_a_run_with_scores_can_be_resumed(scores, tmp_path):
    flags = [*SMALL, "--n_unlabeled", 600, "--n_labeled", 100, "--max_steps", 2, "--scores", scores[0], "--loss_prior", 0.2, "--out_dir", tmp_path / "run"]
    run("train.py", *flags)
    before = torch.load(tmp_path / "run" / "ckpt.pt")["loss_prior"]
    for steps, again in [(3, flags), (4, [])]:    # the same flags as before, or none
        assert f"step {steps}/{steps}" in run("train.py", *again, "--resume", "--max_steps", steps, "--out_dir", tmp_path / "run").stdout
        assert torch.load(tmp_path / "run" / "ckpt.pt")["loss_prior"] == before
    kept = torch.load(scores[0])
    n_kept = math.ceil(0.9 * (1 - 0.2) * 600)
    passed = (kept["z_s"] <= kept["z_u"].sort().values[n_kept - 1]).float().mean().item()
    assert before == pytest.approx(0.2 * passed / (n_kept / 600))


def test_bad_scores_are_refused(scores, tmp_path):
    some = ["--n_unlabeled", 600, "--n_labeled", 100, "--max_steps", 1]
    refused(1, "none.pt does not exist: pu_filter.py writes it", "train.py", *SMALL, *some, "--scores", tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_text("garbage")
    refused(1, "bad.pt is not what pu_filter.py writes", "train.py", *SMALL, *some, "--scores", tmp_path / "bad.pt", "--out_dir", tmp_path / "run")
    refused(2, "is for other images", "train.py", *SMALL, *some, "--seed", 1, "--scores", scores[0], "--out_dir", tmp_path / "run")
    refused(2, "--keep needs --scores", "train.py", *SMALL, *some, "--keep", "0.5", "--out_dir", tmp_path / "run")
    refused(2, "--scores and --algorithm oracle", "train.py", *SMALL, *some, "--scores", scores[0], "--algorithm", "oracle", "--out_dir", tmp_path / "run")
    for damage, status, words in [({"images": ""}, 2, "is for other images"),
                                  ({"z_u": torch.arange(600), "z_s": torch.full((100,), -9)}, 2, "leave a prior of")]:
        torch.save({**torch.load(scores[0]), **damage}, tmp_path / "bad.pt")
        refused(status, words, "train.py", *SMALL, *some, "--scores", tmp_path / "bad.pt", "--out_dir", tmp_path / "run")
    refused(2, "need at least 4", "pu_filter.py", "--n_labeled", 3, "--out_dir", tmp_path / "run")
    refused(2, "already holds scores", "pu_filter.py", "--out_dir", scores[0].parent)
    assert not (tmp_path / "run").exists() and math.isfinite(torch.load(scores[0])["z_u"].sum())
