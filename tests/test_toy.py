"""The toy: a short run prints a table and three rates, and draws four panels."""
import re

import numpy as np
import pytest
from conftest import run
from PIL import Image


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Runs 200 steps of the toy. Returns its folder and what it printed."""
    folder = tmp_path_factory.mktemp("toy")
    return folder, run("toy.py", "--steps", 200, cwd=folder).stdout


def test_pu_training_draws_more_normal_points_than_ordinary_training(toy):
    ordinary, pu, oracle = (float(rate) for rate in re.findall(r"rate (\S+)", toy[1]))
    assert 0 <= ordinary < 0.65 < 0.8 < pu <= 1 and 0.9 < oracle <= 1


def test_the_default_u_is_half_sensitive(toy):
    assert "5,000 of 10,000 sensitive" in toy[1]
    rows = re.findall(r"^(?:at the switch|ordinary|PU|oracle)((?: +[\d.]+){6})$", toy[1], re.M)
    assert len(rows) == 4
    for l_n, l_hidden, l_s, _, l_u, prior_l_s in np.array([row.split() for row in rows], float):
        assert l_u == pytest.approx((l_n + l_hidden) / 2, abs=0.08)    # means of 20,000 points
        assert prior_l_s == pytest.approx(l_s / 2, abs=1e-3)


def test_the_picture_has_four_panels(toy):
    with Image.open(toy[0] / "toy.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] % 4 == 0
    panels = np.split(pixels, 4, axis=1)
    for panel in panels[2:]:    # in which most points are normal, and blue
        red_minus_blue = panel[:, :, 0].astype(int) - panel[:, :, 2]
        assert (red_minus_blue < -60).sum() > 2 * (red_minus_blue > 60).sum()
    for panel in panels:
        dots = (panel[60:-60] < 250).any(axis=2)    # between the two lines of text
        assert 0.03 < dots.mean() < 0.5 and dots[:, :210].any() and dots[:, 210:].any()
