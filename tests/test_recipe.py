"""The recipe of a run: its length, where the PU risk begins, and what changes with the steps."""
import argparse
import math

import pytest

from recipe import (
    averaging,
    batch_composition,
    formula,
    in_words,
    learning_rate,
    steps_before_pu,
)


def wishes(**others):
    defaults = dict(algorithm="pu", pu_start=None, max_steps=4000, epochs=None, batch_size=128,
                    warmup_steps=200, lr=2e-3, ema_decay=0.999, init_from=None)
    return argparse.Namespace(**defaults | others)


@pytest.mark.parametrize("n_labeled, n_s, pu_start", [
    (2500, 48, 2000), (500, 48, 3375), (100, 48, 3875), (20, 16, 3925), (1, 8, 3993)])
def test_with_few_labels_the_pu_risk_begins_later(n_labeled, n_s, pu_start):
    """It has half of the steps, but passes at most 60 times over S."""
    assert batch_composition("pu", 128, 0.5, 50000, n_labeled) == (128 - n_s, n_s)
    assert steps_before_pu(wishes(), n_s / n_labeled) == pu_start


@pytest.mark.parametrize("wish, pu_start", [(0, 0), (1 / 3, 1333), (0.75, 3000), (10, 10)])
def test_the_pu_risk_begins_where_a_flag_says(wish, pu_start):
    assert steps_before_pu(wishes(pu_start=wish), 48 / 20) == pu_start


def test_only_the_pu_risk_has_a_first_part():
    for algorithm in ["supervised", "unsupervised", "oracle"]:
        assert steps_before_pu(wishes(algorithm=algorithm), 0) == 0


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


def test_the_number_of_sensitive_images_is_where_the_difference_is_least_noisy():
    """Var(mean_u - prior mean_s) = 1 / n_u + prior^2 / n_s for losses of variance 1."""
    for batch_size, prior in [(128, 0.5), (128, 1 / 11), (1024, 0.3), (16, 1 / 11)]:
        def variance(n_s, batch_size=batch_size, prior=prior):
            return 1 / (batch_size - n_s) + prior ** 2 / n_s
        n_u, n_s = batch_composition("pu", batch_size, prior, 9000, 1000)
        assert n_u + n_s == batch_size
        assert n_s % (batch_size // 16) == 0
        best = min(range(1, batch_size), key=variance)
        assert best <= n_s <= best + batch_size // 16
    assert batch_composition("pu", 2, 0.9, 100, 100) == (1, 1)    # each is paired with one of U


def test_the_composition_of_other_batches():
    assert batch_composition("supervised", 128, 0.5, 300, 100) == (96, 32)
    assert batch_composition("supervised", 128, 0.5, 999, 1) == (127, 1)
    assert batch_composition("supervised", 128, 0.5, 100, 900) == (64, 64)
    for algorithm in ["unsupervised", "oracle"]:
        assert batch_composition(algorithm, 1, 0.5, 100, 100) == (1, 0)
    for algorithm in ["pu", "supervised"]:
        with pytest.raises(ValueError, match="--batch_size 1 leaves no room"):
            batch_composition(algorithm, 1, 0.5, 100, 100)
    with pytest.raises(ValueError, match="--scores leave a prior of 1.5"):
        batch_composition("pu", 128, 1.5, 100, 100)


def test_the_risk_in_words():
    assert formula("pu", 1 / 11, 0.5, "abs") == (
        "the PU risk, 0.09091 E_S[-log(1 - exp(-l))] + |E_U[l] - 0.09091 E_S[l]|")
    assert formula("pu", 0.5, 0.5, "none").endswith("+ E_U[l] - 0.5 E_S[l]")
    assert formula("supervised", 0.5, 0.1, "abs") == (
        "the supervised risk, 0.9 E_U[l] + 0.1 E_S[-log(1 - exp(-l))]")
    assert formula("oracle", 0.5, 0.1, "abs") == "the ordinary diffusion loss, E_U[l]"


def test_each_part_of_a_run_in_words():
    args = wishes(recipe=None, correction="abs")
    first, second = in_words(args, 80, 48, 2000, 0.5, 0.05, 48 / 2500)
    assert first == ("steps 1 to 2000 minimise the ordinary diffusion loss, E_U[l], on 128 images "
                     "of U a step")
    assert second == ("steps 2001 to 4000 minimise the PU risk, 0.5 E_S[-log(1 - exp(-l))] + "
                      "|E_U[l] - 0.5 E_S[l]|, on 80 images of U and 48 of S a step")
    assert "come 96 times each" in in_words(args, 80, 48, 2000, 0.5, 0.05, 48 / 1000)[-1]
