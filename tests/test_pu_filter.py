"""The filter's risk in closed form, cross-fitting, and its files of scores."""
import pytest
import torch
from conftest import refused

import data
from classifier import distort
from pu_filter import cross_scores, nnpu_loss, read_scores

CPU = torch.device("cpu")


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.8])
def test_on_a_literal_mixture_the_risk_is_the_one_with_all_labels(prior):
    """U = N + S: the risk is half the sum of the two classes' mean sigmoid losses."""
    torch.manual_seed(0)
    z_n, z_s = (torch.randn(round(100 * p), dtype=torch.float64) for p in (1 - prior, prior))
    expected = 0.5 * torch.sigmoid(-z_s).mean() + 0.5 * torch.sigmoid(z_n).mean()
    risk = nnpu_loss(torch.cat([z_n, z_s]), z_s, prior)
    assert risk.item() == pytest.approx(expected.item(), rel=1e-12)


def test_below_zero_it_descends_on_minus_the_difference_alone():
    z_u = torch.full((4,), -3.0, requires_grad=True)
    z_s = torch.full((2,), 2.0, requires_grad=True)
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
    black = torch.full((2, 1, 8, 8), -1.0)
    assert torch.equal(distort(black, False), black)


def test_cross_fitting_finds_the_hidden_ones():
    """Images that are bright above are sensitive."""
    generator = torch.Generator().manual_seed(0)
    is_sensitive = torch.rand(1200, generator=generator) < 0.5
    images = torch.randint(100, (1200, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[is_sensitive, :, :4] += 100
    s = is_sensitive.nonzero()[:200, 0]
    u = torch.tensor(sorted(set(range(1200)) - set(s.tolist())))
    torch.manual_seed(0)
    z_u, z_s = cross_scores(images, u, s, 0.4, False, 40, CPU)
    assert ((z_u > 0) == is_sensitive[u]).float().mean() > 0.97 and (z_s > 0).float().mean() > 0.95


def test_the_command_scores_real_digits(scores):
    path, printed = scores
    saved = torch.load(path)
    assert len(saved["z_u"]) == len(saved["u"]) == 600
    assert len(saved["z_s"]) == len(saved["s"]) == 100
    assert (path.parent / "dropped.png").stat().st_size > 1000
    rows = [list(map(float, line.split())) for line in printed.splitlines()[1:8]]
    mnist = data.load("mnist")
    odd = mnist.train_labels[saved["u"]] % 2 == 1
    order = saved["z_u"].argsort()
    for keep, by_s, by_labels, normal in rows:
        some = order[:round(keep * 600)]
        assert by_labels == pytest.approx(odd[some].float().mean().item(), abs=1e-4)
        assert normal == pytest.approx(((~odd[some]).sum() / 300).item(), abs=1e-4)
        passed = (saved["z_s"] <= saved["z_u"][some[-1]]).float().mean().item()
        assert by_s == pytest.approx(0.5 * passed / keep, abs=1e-4)
        assert by_s == pytest.approx(by_labels, abs=0.2)    # three standard errors of 100 images
    assert rows[4][2] < 0.4    # even 10 steps are better than chance


@pytest.mark.parametrize("prior", [0.2, 0.5])
def test_the_risk_of_what_is_kept_is_exact(prior):
    """U = N + S: with the prior of the kept images, the difference of the losses on U and S gives
    the loss on the kept normal images."""
    torch.manual_seed(0)
    n, s = (torch.rand(round(1000 * p), 2, dtype=torch.float64) for p in (1 - prior, prior))
    u = torch.cat([n, s])    # columns: score, l

    def mean(x):
        return x[x[:, 0] < 0.4, 1].mean()

    def kept(x):
        return (x[:, 0] < 0.4).double().mean()

    kept_prior = prior * kept(s) / kept(u)
    difference = (mean(u) - kept_prior * mean(s)) / (1 - kept_prior)
    assert difference.item() == pytest.approx(mean(n).item(), rel=1e-12)


@pytest.fixture(scope="module")
def digits():
    """Returns MNIST, and the U and S that the scores belong to."""
    mnist = data.load("mnist")
    u, s, _ = data.split("mnist", mnist, prior=0.5, n_unlabeled=600, n_labeled=100)
    return mnist, u, s


def test_read_scores_cuts_u_and_s_at_the_same_score(scores, digits):
    mnist, u, s = digits
    saved = torch.load(scores[0])
    kept_u, kept_s = read_scores(scores[0], mnist, u, s, 0.5)
    threshold = saved["z_u"].sort().values[299]
    assert torch.equal(kept_u, u[saved["z_u"] <= threshold]) and len(kept_u) == 300
    assert torch.equal(kept_s, s[saved["z_s"] <= threshold])


def test_read_scores_refuses_what_is_none_and_other_images(scores, digits, tmp_path):
    mnist, u, s = digits
    bad = tmp_path / "bad.pt"
    with pytest.raises(FileNotFoundError, match="bad.pt does not exist: pu_filter.py writes it"):
        read_scores(bad, mnist, u, s, 0.5)
    bad.write_text("garbage")
    with pytest.raises(OSError, match="bad.pt is not what pu_filter.py writes"):
        read_scores(bad, mnist, u, s, 0.5)
    with pytest.raises(ValueError, match="is for other images"):
        read_scores(scores[0], mnist, u.flip(0), s, 0.5)
    with pytest.raises(ValueError, match="is for other images"):
        read_scores(scores[0], mnist, u, s.flip(0), 0.5)
    saved = torch.load(scores[0])
    for damage, error, words in [({"images": ""}, ValueError, "is for other images"),
                                 ({"z_u": saved["z_s"]}, OSError, "is not what pu_filter.py wr"),
                                 ({"z_s": saved["z_s"] / 0}, OSError, "bad.pt holds numbers that")]:
        torch.save(saved | damage, bad)
        with pytest.raises(error, match=words):
            read_scores(bad, mnist, u, s, 0.5)


def test_bad_command_lines(scores, tmp_path):
    before = scores[0].read_bytes()
    refused(2, "need at least 4", "pu_filter.py", "--n_labeled", 3, "--out_dir", tmp_path / "run")
    refused(2, "already holds scores", "pu_filter.py", "--out_dir", scores[0].parent)
    assert scores[0].read_bytes() == before and torch.load(scores[0])["z_u"].isfinite().all()
