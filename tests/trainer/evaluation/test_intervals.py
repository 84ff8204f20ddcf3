"""Intervals of means and of paired differences: worked by hand, and how often they hold the true value."""

import math
import random

import pytest

from expo.evaluation.intervals import difference_with_interval, mean_with_interval, wilson

NAN = float("nan")


def ends(found):
    return found["low"], found["high"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # z^2 / (n + z^2) and n / (n + z^2) with z^2 = 3.8415
        ([0.0] * 16, (0.0, 3.8415 / 19.8415)),
        ([1.0] * 16, (16 / 19.8415, 1.0)),
        ([0.0], (0.0, 3.8415 / 4.8415)),
        ([1.0], (1 / 4.8415, 1.0)),
        # Newcombe 1998 (Statistics in Medicine 17:857), table I: 81 of 263, and 1 of 29
        ([1.0] * 81 + [0.0] * 182, (0.2553, 0.3662)),
        ([1.0] + [0.0] * 28, (0.0061, 0.1718)),
    ],
)
def test_scores_of_0_and_1_have_wilsons_interval(scores, expected):
    found = mean_with_interval(scores)
    assert found["interval"] == "wilson"
    assert ends(found) == pytest.approx(expected, abs=6e-5)
    assert found["mean"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    "scores",
    [
        [0.5] * 16,
        [0.5],
        [0.1, 0.9],
        [i / 10 for i in range(9)],  # nine questions
        [0.0] * 15 + [1 / 16],  # one of 256 replies is correct
        [0.25] * 61 + [0.5, 0.75, 1.0],
        [0.1 + 0.2] * 20 + [0.3] * 20,  # equal but for rounding
    ],
)
def test_scores_without_enough_spread_have_wilsons_interval_with_n_questions(scores):
    found = mean_with_interval(scores)
    assert found["interval"] == "wilson"
    assert ends(found) == pytest.approx(wilson(sum(scores) / len(scores), len(scores)))
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
    assert found["high"] - found["low"] > 0.1


def test_spread_out_scores_have_a_bootstrap_interval():
    found = mean_with_interval([i / 16 for i in range(17)] * 4)
    # 1.96 * std / sqrt(n) of these 68 scores
    assert found["interval"] == "bootstrap"
    assert found["high"] - 0.5 == pytest.approx(1.96 * math.sqrt((17**2 - 1) / 12) / 16 / math.sqrt(68), rel=0.1)


@pytest.mark.parametrize(("num", "bound"), [(1, 0.7935), (4, 0.4899), (16, 0.1936), (1000, 0.0038)])
def test_ties_alone_do_not_show_that_there_is_no_difference(num, bound):
    found = difference_with_interval([0.0] * num)
    assert (found["mean"], found["interval"]) == (0.0, "wilson")
    assert ends(found) == pytest.approx((-bound, bound), abs=1e-4)


def test_the_interval_of_a_difference_is_symmetric_in_a_and_b():
    gains = [1.0] * 5 + [-1.0] * 2 + [0.0] * 30
    one, other = difference_with_interval(gains), difference_with_interval([-gain for gain in gains])
    assert ends(one) == pytest.approx([-end for end in reversed(ends(other))])
    assert one["low"] < one["mean"] < one["high"]
    assert one["mean"] == pytest.approx(3 / 37)


def test_gains_on_every_question_exclude_zero_and_stay_in_range():
    found = difference_with_interval([1.0] * 8)
    assert 0 < found["low"] < found["mean"] == found["high"] == 1.0


@pytest.mark.parametrize("num", [8, 30, 100])
def test_intervals_of_means_hold_the_true_rate_in_19_of_20_cases(num):
    generator = random.Random(0)
    held = 0
    for _ in range(1000):
        rate = generator.random()
        low, high = ends(mean_with_interval([float(generator.random() < rate) for _ in range(num)]))
        held += low <= rate <= high
    # 950 with a standard deviation of 7
    assert 930 <= held <= 970


@pytest.mark.parametrize(("wins", "losses"), [(0.02, 0.02), (0.3, 0.1), (0.5, 0.4), (0.9, 0.05)])
def test_intervals_of_differences_hold_the_true_one_in_19_of_20_cases(wins, losses):
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        draws = [generator.random() for _ in range(40)]
        gains = [float(draw < wins) - float(wins <= draw < wins + losses) for draw in draws]
        low, high = ends(difference_with_interval(gains))
        held += low <= wins - losses <= high
    assert held >= 0.92 * 400, held


@pytest.mark.parametrize("values", [[], [NAN], [0.5, math.inf], [1.5], [-0.1] * 20])
def test_values_that_are_no_scores_are_refused(values):
    with pytest.raises(ValueError, match=r"expected (one or more|a number from 0 to 1)"):
        mean_with_interval(values)


@pytest.mark.parametrize("values", [[], [NAN] * 20, [-1.5, 0.0]])
def test_values_that_are_no_differences_are_refused(values):
    with pytest.raises(ValueError, match=r"expected (one or more|a number from -1 to 1)"):
        difference_with_interval(values)
