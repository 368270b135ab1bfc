"""The filter's risk in closed form, cross-fitting, its files of scores, and training by them."""
import shlex

import pytest
import torch
from conftest import SMALL, arrows, overhear, refused, run, write

import data
from classifier import distort
from images import load_png, to_uint8
from pu_filter import cross_fit, nnpu_loss
from runtime import UserError

SETS = ["--n_unlabeled", 600, "--n_labeled", 100]    # what the scores are for


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
    difference = 2 * torch.sigmoid(z_u).mean() - torch.sigmoid(z_s).mean()
    assert difference < 0 and loss.item() == pytest.approx(-0.5 * difference.item())
    loss.backward()
    assert (z_u.grad < 0).all() and (z_s.grad > 0).all()


def test_distorted_images_stay_images_and_are_mirrored_if_asked():
    torch.manual_seed(0)
    x = torch.rand(40, 3, 12, 12) * 2 - 1
    distorted = []
    for images, hflip in [(x, False), (x.flip(3), False), (x, True)]:
        torch.manual_seed(1)
        distorted.append(distort(images, hflip))
    plain, mirrored, either = distorted
    assert plain.shape == x.shape and plain.min() >= -1 - 1e-5 and plain.max() <= 1 + 1e-5
    assert (plain != x).flatten(1).any(1).all()
    is_mirrored = (either != plain).flatten(1).any(1)
    assert 10 < is_mirrored.sum() < 30
    assert torch.equal(either[is_mirrored], mirrored[is_mirrored])
    black = torch.full((2, 1, 8, 8), -1.0)
    assert torch.equal(distort(black, True), black)


def test_no_image_is_scored_by_a_network_that_was_trained_on_it():
    """The network answers 1 for the images that it was trained on, and 0 for others."""
    class Memory(torch.nn.Linear):    # has parameters, by which predict finds the device
        def forward(self, x):
            return torch.isin(to_uint8(x[:, :1, 0, 0]), torch.cat(self.others)).float(), x

    def train(others, name):
        memory = Memory(1, 1)
        memory.others = others
        sizes.append(list(map(len, others)))
        return memory

    sizes = []
    images, parts = torch.arange(105).byte().view(-1, 1, 1, 1), torch.arange(105).split([100, 5])
    logits = cross_fit(images, parts, train)
    assert [z.tolist() for z in logits] == [100 * [0], 5 * [0]]
    assert [sum(counts) for counts in zip(*sizes)] == [300, 15]    # each trains three of four


def test_the_table_of_real_digits(scores):
    path, printed = scores
    saved = torch.load(path)
    rows = [list(map(float, line.split())) for line in printed.splitlines()[2:9]]
    odd = data.load("mnist").train_labels[saved["u"]] % 2 == 1
    order = saved["z_u"].argsort()
    for keep, by_s, by_labels, normal in rows:
        n_odd = odd[order[:round(keep * 600)]].sum().item()
        assert by_labels == pytest.approx(n_odd / round(keep * 600), abs=1e-4)
        assert normal == pytest.approx((round(keep * 600) - n_odd) / 300, abs=1e-4)
        passed = (saved["z_s"] <= saved["z_u"][order[round(keep * 600) - 1]]).float().mean().item()
        assert by_s == pytest.approx(0.5 * passed / keep, abs=1e-4)
        assert by_s == pytest.approx(by_labels, abs=0.2)    # three standard errors of 100 images
    assert rows[4][2] < 0.4    # better than chance


def test_left_and_right_are_told_apart(tmp_path):
    """In U, half of the arrows point to the left. In S, all do."""
    torch.manual_seed(0)
    write(arrows(80, 40), tmp_path / "unlabeled")
    write(arrows(40, 40), tmp_path / "sensitive")
    printed = run("pu_filter.py", "--dataset", "folder", "--data_dir", tmp_path, "--image_size", 16,
                  "--prior", 0.5, "--device", "cpu", "--steps", 20, "--out_dir",
                  tmp_path / "my scores").stdout
    path = tmp_path / "my scores" / "scores.pt"
    assert torch.equal(torch.load(path)["z_u"] > 0, torch.arange(80) < 40)
    dropped, kept = load_png(path.with_name("dropped.png"))[0, :16].float().split(7 * 17 + 11, 1)
    assert dropped[:, 8:16].sum() > dropped[:, :8].sum() and kept[:, 8:16].sum() < kept[:, :8].sum()
    assert str(path) in shlex.split(printed.replace(",", ""))    # of a command to copy


def test_what_can_be_refused_is_refused_before_the_work(scores, tmp_path):
    refused("need at least 4", "pu_filter.py", "--n_labeled", 3, "--out_dir", tmp_path / "run")
    refused("already holds scores", "pu_filter.py", "--out_dir", scores[0].parent)
    result = run("pu_filter.py", "--steps", 1, "--out_dir", "/proc", check=False)    # read-only
    assert result.returncode == 1 and "fold 1" not in result.stderr


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """Writes scores: a quarter of S is below the median of U -> file, content, images."""
    mnist = data.load("mnist")
    u, s, _ = data.split("mnist", mnist, prior=0.5, n_unlabeled=600, n_labeled=100)
    saved = dict(u=u, s=s, z_u=torch.linspace(-3, 3, 600), z_s=torch.linspace(-1, 3, 100),
                 digest=data.digest(mnist.train))
    path = tmp_path_factory.mktemp("scores") / "scores.pt"
    torch.save(saved, path)
    return path, saved, mnist.train


def test_u_and_s_are_cut_at_the_same_score_and_other_scores_are_refused(ordered, tmp_path):
    path, saved, images = ordered
    u, s = data.read_scores(path, images, saved["u"], saved["s"], 0.5)
    assert torch.equal(u, saved["u"][:300]) and torch.equal(s, saved["s"][:25])
    bad = tmp_path / "bad.pt"
    for damage in [{"digest": ""}, {"u": u}, {"s": s}, {"z_s": saved["z_s"] / 0}]:
        torch.save(saved | damage, bad)
        with pytest.raises(UserError, match="bad.pt"):
            data.read_scores(bad, images, saved["u"], saved["s"], 0.5)
    refused("for these images", "train.py", *SMALL, *SETS, "--seed", 1, "--scores", path,
            "--max_steps", 2, "--out_dir", tmp_path / "run")
    torch.save(saved | dict(z_s=torch.full([100], -3.0)), bad)    # half of U is dropped, none of S
    refused("leave a prior of 1:", "train.py", *SMALL, *SETS, "--scores", bad, "--keep", 0.5,
            "--max_steps", 2, "--out_dir", tmp_path / "run")


def test_training_sees_what_is_kept_and_nothing_else(ordered, tmp_path):
    path, saved, images = ordered
    kept_u, kept_s = ({image.numpy().tobytes() for image in images[index]}
                      for index in [saved["u"][:300], saved["s"][:25]])
    for x_0, _, _ in overhear("train.py", *SMALL, *SETS, "--batch_size", 100, "--scores", path,
                              "--keep", 0.5, "--max_steps", 2, "--out_dir", tmp_path / "run")[1]:
        shown = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        # with the prior that is left, 0.25, S has a share of 0.2, rounded up to sixteenths
        assert set(shown[:76]) <= kept_u and set(shown[76:]) <= kept_s and len(set(shown)) > 50
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["loss_prior"] == 0.5 and ckpt["loss_prior"] == pytest.approx(0.25)


@pytest.mark.parametrize("keep, n_kept", [(0.3, 0), (0.335, 1)])
def test_too_little_of_s_is_refused_and_not_worked_around(ordered, tmp_path, keep, n_kept):
    """train.py never changes the objective silently: the user must choose."""
    flags = ["train.py", *SMALL, *SETS, "--max_steps", 2, "--scores", ordered[0], "--keep", keep,
             "--out_dir", tmp_path / "run"]
    refused(f"{n_kept} images of S", *flags)
    assert not (tmp_path / "run").exists()
    run(*flags, "--algorithm", "unsupervised")
