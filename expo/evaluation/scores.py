"""Scores of graded replies: pass@k and the majority vote.

Source: the unbiased estimator of Chen et al. (arXiv 2107.03374, eq. 1), pass@k = 1 - C(n - c, k) / C(n, k).
Letters: n replies to each question, c of them correct.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from expo.evaluation.intervals import mean_with_interval
from expo.rewards.answers import normalise
from expo.rewards.groups import fractions

Row = Mapping[str, Any]  # one reply, as `GradedRollouts.rows` has it
Agree = Callable[[Sequence[tuple[str, str]]], list[bool]]  # for each pair of stated answers, whether they agree


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one or more of k replies, drawn without replacement from n with c correct ones, are correct.

    Source: arXiv 2107.03374, eq. 1, as a running product: binomial coefficients would overflow a float.

    Raises: ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k got n = {n}, c = {c}, k = {k}; expected 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n: the k of tables and levels."""
    return [2**power for power in range(n.bit_length())]


def score_set(rows: Sequence[Row], n: int, ks: Sequence[int], level_ks: Sequence[int]) -> dict[str, Any]:
    """pass@k of a set and of its levels, and the fractions of replies without a gradable answer.

    Args:
        rows: every reply; the replies to one question are consecutive.
        n: replies to each question.
        ks: the k for the whole set.
        level_ks: the k for its levels.
    """
    counts: list[int] = []
    counts_by_level: dict[str, list[int]] = {}
    for group in group_by_question(rows, n):
        counts.append(num_correct(group))
        counts_by_level.setdefault(group[0]["level"], []).append(counts[-1])
    levels = {level: _pass_at(correct, n, level_ks) for level, correct in sorted(counts_by_level.items()) if level}
    return {
        **_pass_at(counts, n, ks),
        **fractions(
            [row["verdict"] for row in rows],
            [row["truncated"] for row in rows],
            [row.get("unevaluated", False) for row in rows],
        ),
        "by_level": levels,
    }


def _pass_at(correct: Sequence[int], n: int, ks: Sequence[int]) -> dict[str, Any]:
    estimates = {str(k): mean_with_interval([pass_at_k(n, c, k) for c in correct]) for k in ks}
    return {"num_questions": len(correct), "pass_at": estimates}


def group_by_question(rows: Sequence[Row], n: int) -> Iterator[Sequence[Row]]:
    """The n replies to each question in turn."""
    assert len(rows) % n == 0
    return (rows[start : start + n] for start in range(0, len(rows), n))


def num_correct(group: Iterable[Row]) -> int:
    """c, the number of correct replies to a question."""
    return sum(row["verdict"] == "correct" for row in group)


def majority_scores(groups: Sequence[Sequence[Row]], agree: Agree) -> list[float]:
    """For each question the probability that the majority vote is correct.

    Answers that agree count as one answer, and replies without an answer do not vote. If several answers have the most
    votes, one of them is drawn uniformly: the score is then 1 / (number of such answers) if the correct one is among
    them. A question without any answer scores 0.

    Source: majority voting of Wang et al., arXiv 2203.11171, section 2.

    Args:
        groups: the replies to each question.
        agree: compares stated answers. It gets only the pairs that can decide a vote: those of questions with some
            correct replies and at least as many replies with other answers, which may be one answer in several forms.
    """
    num_right = [num_correct(group) for group in groups]
    wrong_votes = [_wrong_votes(group) for group in groups]
    undecided = [0 < c <= sum(votes.values()) for c, votes in zip(num_right, wrong_votes, strict=True)]
    pairs = [
        list(itertools.combinations(sorted(votes), 2)) if is_undecided else []
        for votes, is_undecided in zip(wrong_votes, undecided, strict=True)
    ]
    agreements = iter(agree([pair for pairs_of_question in pairs for pair in pairs_of_question]))
    scores = []
    for c, votes, pairs_of_question, is_undecided in zip(num_right, wrong_votes, pairs, undecided, strict=True):
        agreeing = [pair for pair in pairs_of_question if next(agreements)]
        if not is_undecided:
            scores.append(1.0 if c else 0.0)
            continue
        totals = [sum(votes[answer] for answer in answers) for answers in _merge(list(votes), agreeing)]
        most = max(c, *totals)
        scores.append(1.0 / (1 + totals.count(most)) if c == most else 0.0)
    return scores


def _wrong_votes(group: Iterable[Row]) -> Counter[str]:
    """Votes for each answer that was not judged correct, by its normal form."""
    return Counter(
        normalise(row["stated"]) for row in group if row["stated"] is not None and row["verdict"] != "correct"
    )


def _merge(answers: Sequence[str], agreeing: Iterable[tuple[str, str]]) -> list[set[str]]:
    """The sets of answers that are connected by agreeing pairs."""
    set_of = {answer: {answer} for answer in answers}
    for first, second in agreeing:
        merged = set_of[first] | set_of[second]
        set_of.update(dict.fromkeys(merged, merged))
    return list({id(members): members for members in set_of.values()}.values())
