"""The scores of an evaluation: what results.json records of each question set."""

from collections.abc import Mapping, Sequence
from typing import Any

from expo.evaluation.intervals import mean_with_interval
from expo.evaluation.scores import (
    Agree,
    Row,
    group_by_question,
    majority_scores,
    num_correct,
    powers_of_two,
    score_set,
)


def summarise(replies: Mapping[str, Sequence[Row]], num_samples: int, agree: Agree) -> dict[str, dict[str, Any]]:
    """The scores of every set.

    Args:
        replies: of each set, num_samples consecutive ones to each question.
        agree: whether two stated answers agree.
    """
    return {name: _summarise_set(rows, num_samples, agree) for name, rows in replies.items()}


def _summarise_set(rows: Sequence[Row], n: int, agree: Agree) -> dict[str, Any]:
    """pass@k for every k up to n, the majority vote's score, lengths, and the scores of each question."""
    groups = list(group_by_question(rows, n))
    majority = majority_scores(groups, agree)
    scores = score_set(rows, n, range(1, n + 1), powers_of_two(n))
    return {
        **scores,
        "mean_at_n": scores["pass_at"]["1"],
        "maj_at_n": mean_with_interval(majority),
        "mean_length": sum(row["num_tokens"] for row in rows) / len(rows),
        "questions": [
            {
                "id": group[0]["question_id"],
                "level": group[0]["level"],
                "correct": num_correct(group),
                "majority": score,
            }
            for group, score in zip(groups, majority, strict=True)
        ],
    }
