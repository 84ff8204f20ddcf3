"""What replies with verdicts are worth: pass@k, the majority's answer, and how sure each number is.

Source: the unbiased estimator of Chen et al. (arXiv 2107.03374, eq. 1), pass@k = 1 - C(n - c, k) / C(n, k).
Letters: n replies to each question, c of them correct.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expo.rewards.answers import normalise
from expo.rewards.groups import fractions

NUM_RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then move by under 5 % of its width

Row = Mapping[str, Any]  # one reply, as `GradedRollouts.rows` has it
Agree = Callable[[Sequence[tuple[str, str]]], list[bool]]  # whether two stated answers are one, pair by pair


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k replies, drawn without replacement from n of which c are correct, is correct.

    Source: arXiv 2107.03374, eq. 1, as a running product: exact counts overflow no float.

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


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions and the 95 % percentile-bootstrap interval of it, as mean, low, high."""
    data = torch.tensor(values, dtype=torch.float64)
    means = data[_resamples(len(values))].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(data.mean()), "low": low, "high": high}


@functools.lru_cache(maxsize=8)
def _resamples(count: int) -> Tensor:
    """Which of `count` values the bootstrap draws, [NUM_RESAMPLES, count]: the same for every number of a set."""
    return torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def score_set(rows: Sequence[Row], n: int, ks: Sequence[int], level_ks: Sequence[int]) -> dict[str, Any]:
    """pass@k of a set, as a whole and by level, and the shares of replies without an answer.

    Args:
        rows: every reply, those of one question side by side.
        n: replies to each question.
        ks: the k of the whole set.
        level_ks: the k of its levels.
    """
    counts: list[int] = []
    by_level: dict[str, list[int]] = {}
    for group in by_question(rows, n):
        counts.append(num_correct(group))
        by_level.setdefault(group[0]["level"], []).append(counts[-1])
    levels = {level: _pass_at(found, n, level_ks) for level, found in sorted(by_level.items()) if level}
    return {
        **_pass_at(counts, n, ks),
        **fractions([row["verdict"] for row in rows], [row["truncated"] for row in rows]),
        "by_level": levels,
    }


def _pass_at(correct: Sequence[int], n: int, ks: Sequence[int]) -> dict[str, Any]:
    estimates = {str(k): mean_with_interval([pass_at_k(n, c, k) for c in correct]) for k in ks}
    return {"num_questions": len(correct), "pass_at": estimates}


def by_question(rows: Sequence[Row], n: int) -> Iterator[Sequence[Row]]:
    """The replies of each question in turn."""
    assert len(rows) % n == 0
    return (rows[start : start + n] for start in range(0, len(rows), n))


def num_correct(group: Iterable[Row]) -> int:
    """c, the correct ones among a question's replies."""
    return sum(row["verdict"] == "correct" for row in group)


def majority_scores(groups: Sequence[Sequence[Row]], agree: Agree) -> list[float]:
    """For each question the chance that the answer stated most often is right.

    Answers that agree are one answer; replies that state none have no vote. Where several answers have the most
    votes, one of them is drawn, each alike: the score is then 1 / (their number) if the right one is among them. A
    question to which no reply states an answer scores 0.

    Source: the vote is that of Wang et al., arXiv 2203.11171, section 2.

    Args:
        groups: the replies of each question.
        agree: tells whether two stated answers are one. Asked only where it can matter: where some replies are right
            and no fewer have other answers, which may be one answer in several forms.
    """
    right = [num_correct(group) for group in groups]
    others = [_other_answers(group) for group in groups]
    contested = [0 < c <= sum(votes.values()) for c, votes in zip(right, others, strict=True)]
    pairs = [
        list(itertools.combinations(sorted(votes), 2)) if is_contested else []
        for votes, is_contested in zip(others, contested, strict=True)
    ]
    verdicts = iter(agree([pair for some in pairs for pair in some]))
    scores = []
    for c, votes, some, is_contested in zip(right, others, pairs, contested, strict=True):
        same = [pair for pair in some if next(verdicts)]
        if not is_contested:
            scores.append(1.0 if c else 0.0)
            continue
        totals = [sum(votes[answer] for answer in members) for members in _joined(list(votes), same)]
        most = max(c, *totals)
        scores.append(1.0 / (1 + totals.count(most)) if c == most else 0.0)
    return scores


def _other_answers(group: Iterable[Row]) -> Counter[str]:
    """Votes for each answer that was not judged correct, by its normal form."""
    return Counter(
        normalise(row["stated"]) for row in group if row["stated"] is not None and row["verdict"] != "correct"
    )


def _joined(answers: Sequence[str], same: Iterable[tuple[str, str]]) -> list[set[str]]:
    """The answers in sets that `same` pairs link."""
    of = {answer: {answer} for answer in answers}
    for one, other in same:
        merged = of[one] | of[other]
        of.update(dict.fromkeys(merged, merged))
    return list({id(members): members for members in of.values()}.values())
