"""The recipe of a run: its length, where the PU risk begins, and what changes with the steps."""
import argparse
import math

import pytest

from recipe import averaging, first_pu_step, learning_rate


def wishes(**others):
    defaults = dict(algorithm="pu", pu_start=None, max_steps=4000, epochs=None, batch_size=128,
                    warmup_steps=200, lr=2e-3, ema_decay=0.999, init_from=None)
    return argparse.Namespace(**defaults | others)


@pytest.mark.parametrize("n_labeled, pu_start", [
    (2500, 2000), (500, 3375), (100, 3875), (20, 3975), (1, 3999)])
def test_with_few_labels_the_pu_risk_begins_later(n_labeled, pu_start):
    """It has half of the steps, but its 48 images of S a step pass at most 60 times over S."""
    assert first_pu_step(wishes(), 50000, 48 / n_labeled) == pu_start


@pytest.mark.parametrize("wish, pu_start", [(0, 0), (1 / 3, 1333), (0.75, 3000), (10, 10)])
def test_the_pu_risk_begins_where_a_flag_says(wish, pu_start):
    assert first_pu_step(wishes(pu_start=wish), 50000, 48 / 20) == pu_start


def test_only_the_pu_risk_has_a_first_part():
    for algorithm in ["supervised", "unsupervised", "oracle"]:
        assert first_pu_step(wishes(algorithm=algorithm), 50000, 0) == 0


def test_steps_follow_from_epochs():
    args = wishes(max_steps=None, epochs=100, pu_start=0)
    first_pu_step(args, 27500, 0.01)
    assert args.max_steps == math.ceil(100 * 27500 / 128)


def test_a_second_part_needs_steps():
    with pytest.raises(ValueError, match="--pu_start 4000 leaves no step"):
        first_pu_step(wishes(pu_start=4000), 50000, 0.1)


@pytest.mark.parametrize("pu_start", [0, 10, 2000, 3975])
def test_the_average_follows_each_part(pu_start):
    """At its end, at most exp(-2) of the average is older than the part."""
    args = wishes()
    old = 1.0
    for step in range(pu_start, args.max_steps):
        old *= averaging(args, step, pu_start)
    assert old <= math.exp(-2)
    assert averaging(wishes(max_steps=9999), 9000, 0) == 0.999    # what the flag says
    assert averaging(args, 0, 2000) == 0.1    # random weights are soon forgotten
    assert averaging(wishes(init_from="model"), 0, 0) == 0.999    # those of a model are not


def test_the_learning_rate_is_constant_then_a_cosine():
    args = wishes()
    assert learning_rate(args, 0, 2000) == pytest.approx(2e-3 / 201)
    assert learning_rate(args, 200, 2000) == learning_rate(args, 2000, 2000) == 2e-3
    assert learning_rate(args, 3000, 2000) == pytest.approx(1e-3)
    assert learning_rate(args, 4000, 2000) == pytest.approx(0)
    assert learning_rate(args, 2100, 0) == pytest.approx(1e-3)    # halfway behind the warm-up
    short = wishes(max_steps=40, warmup_steps=500)    # a quarter of the run at most
    assert learning_rate(short, 10, 0) == 2e-3
