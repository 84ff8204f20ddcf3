"""pass@k against enumeration, intervals, and the evaluation of a known engine."""

import itertools

import pytest

from expo.config import EvaluationSection
from expo.data import Prompted, Question
from expo.evaluate import evaluate, mean_with_interval, pass_at_k
from expo.rewards import Verifier
from expo.rollout import Reply


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


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"k = {k}"):
        pass_at_k(n, c, k)


def test_interval_holds_the_mean_and_shrinks_with_questions():
    few, many = mean_with_interval([0.0, 1.0] * 10), mean_with_interval([0.0, 1.0] * 1000)
    for interval in (few, many):
        assert interval["low"] < interval["mean"] == 0.5 < interval["high"]
    # half-width of a mean of n fair coins: 1.96 * 0.5 / sqrt(n)
    assert few["high"] - 0.5 == pytest.approx(0.219, abs=0.04)
    assert many["high"] - 0.5 == pytest.approx(0.0219, abs=0.003)
    assert mean_with_interval([1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0}


class KnownEngine:
    """Answers the right number for the first `right` samples of a question, 7 for the next, then nothing."""

    def generate(self, requests, sampling, on_progress=None):
        groups = []
        for request in requests:
            right = request.prompt_ids[0]
            texts = ["\\boxed{1}"] * right + ["\\boxed{7}"] + ["no idea"] * len(request.seeds)
            groups.append([Reply([1], [0.0], text == "no idea", text) for text in texts[: len(request.seeds)]])
        return groups


def test_evaluation_reports_each_set_and_level():
    asked = [Prompted(Question(str(n), "?", "1", level), [n]) for n, level in enumerate(["easy", "easy", "hard", ""])]
    section = EvaluationSection(num_samples=10)
    result = evaluate(KnownEngine(), Verifier(), {"set": asked}, section, max_new_tokens=5, seed=0)
    found = result["sets"]["set"]
    assert found["pass_at"]["1"]["mean"] == pytest.approx((0 + 1 + 2 + 3) / 40)
    assert found["pass_at"]["8"]["mean"] == pytest.approx(sum(pass_at_k(10, c, 8) for c in range(4)) / 4)
    assert set(found["pass_at"]) == {"1", "8"}
    assert found["unparsed_fraction"] == found["truncated_fraction"] == pytest.approx((9 + 8 + 7 + 6) / 40)
    assert {name: level["num_questions"] for name, level in found["by_level"].items()} == {
        "easy": 2,
        "hard": 1,
    }
    assert found["by_level"]["hard"]["pass_at"]["1"]["mean"] == pytest.approx(0.2)
