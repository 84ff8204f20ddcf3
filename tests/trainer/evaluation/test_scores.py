"""pass@k against enumeration, intervals, and the majority vote against votes counted by hand."""

import itertools

import pytest

from expo.evaluate import pass_at_k
from expo.evaluation.scores import majority_scores, powers_of_two, score_set
from expo.rewards.verifier import Verifier


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_equals_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        expected = sum(any(index < c for index in draw) for draw in draws) / len(draws)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_survives_large_counts():
    assert pass_at_k(10**6, 0, 10**5) == 0.0
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(64, 64, 64) == 1.0
    # with half of a million correct, k draws without replacement are as good as k coins
    assert pass_at_k(10**6, 5 * 10**5, 3) == pytest.approx(1 - 0.5**3, abs=1e-5)
    assert pass_at_k(10**6, 5 * 10**5, 10**6) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"k = {k}"):
        pass_at_k(n, c, k)


def test_the_ks_of_tables_end_at_n():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(9) == [1, 2, 4, 8]


@pytest.mark.parametrize(("verdict", "low", "high"), [("wrong", 0.0, 0.1936), ("correct", 0.8064, 1.0)])
def test_the_interval_of_a_set_with_one_score_counts_questions_not_replies(verdict, low, high):
    row = {"verdict": verdict, "level": "hard", "truncated": False}
    scores = score_set([row] * 16 * 4, 4, (1, 4), (1,))
    for found in (scores["pass_at"]["1"], scores["pass_at"]["4"], scores["by_level"]["hard"]["pass_at"]["1"]):
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
        assert found["interval"] == "wilson"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1) as found:
        yield found


def group(text):
    """Replies by letter: c correct; u unparsed; any other states that wrong answer."""
    kinds = {"c": ("correct", "42"), "u": ("unparsed", None)}
    chosen = [kinds.get(letter, ("wrong", letter)) for letter in text.split()]
    return [{"verdict": kind, "stated": stated} for kind, stated in chosen]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ("c c 1 2", 1.0),
        ("c 1 1 2", 0.0),
        ("c c 1 1", 1 / 2),
        ("c 1 2 3", 1 / 4),
        ("c u u u", 1.0),
        ("1 1 2", 0.0),
        ("u u", 0.0),
        ("c c 1/2 0.5 3", 1 / 2),
        ("c c 1/2 0.5 \\frac{2}{4} 3", 0.0),
        ("c c x+1 1+x", 1 / 2),
        ("c c c x+1 1+x 7", 1.0),
        ("c \\frac{ {{{ ]](", 1 / 4),
    ],
)
def test_the_majority_vote_splits_ties_evenly(verifier, replies, expected):
    assert majority_scores([group("c"), group(replies)], verifier.agree) == [1.0, pytest.approx(expected)]


def test_answers_are_compared_only_if_they_can_decide_a_vote():
    compared = []

    def agree(pairs):
        compared.extend(pairs)
        return [False] * len(pairs)

    majority_scores([group("c c c 1 2"), group("1 2 3"), group("c 4 5")], agree)
    assert compared == [("4", "5")]
