"""pass@k before and after training, with 95 % intervals: the numbers and the plain-text table."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Scores = dict[str, Any]  # the scores of one evaluation: set name -> {"num_questions", "pass_at", "by_level", ...}

TABLE_KS = (1, 8, 32)  # the values of k that tables show


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One row of a table: one metric of one evaluation set, before and after, and the change."""

    set_name: str
    num_questions: int | None
    metric: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None


def pass_at(scores: dict[str, Any], k: int | str) -> Estimate | None:
    """pass@k of one set or level; None where it was not evaluated."""
    value = scores.get("pass_at", {}).get(str(k))
    return Estimate(value["mean"], value["low"], value["high"]) if value else None


def headline_set(scores: Scores) -> str | None:
    """The evaluation set that the headline reports: the held-out questions if present, else the first set."""
    return "held_out" if "held_out" in scores else next(iter(scores), None)


def compare_scores(before: Scores, after: Scores) -> list[Comparison]:
    """pass@1, pass@8 and pass@32 of every set before and after, with the change."""
    rows = []
    for name in before | after:
        old, new = before.get(name, {}), after.get(name, {})
        num_questions = (new or old).get("num_questions")
        for k in TABLE_KS:
            a, b = pass_at(old, k), pass_at(new, k)
            if a or b:
                rows.append(Comparison(name, num_questions, f"pass@{k}", a, b, difference(a, b)))
    return rows


def difference(before: Estimate | None, after: Estimate | None) -> Estimate | None:
    """`after - before` with a 95 % interval; None unless both are given.

    Source: Newcombe 1998 (Statistics in Medicine 17:873), method 10: half-widths add in quadrature, which assumes
    independent estimates. Both evaluations use the same questions, so the true interval is usually narrower.
    """
    if before is None or after is None:
        return None
    mean = after.mean - before.mean
    low = mean - math.hypot(after.mean - after.low, before.high - before.mean)
    high = mean + math.hypot(after.high - after.mean, before.mean - before.low)
    return Estimate(mean, low, high)


def results_table(before: Scores, after: Scores) -> str:
    """The plain-text table of pass@k before and after, with 95 % intervals; without scores it has no rows.

    Args:
        before: the sets of the first evaluation, as in `evaluations.jsonl`.
        after: the sets of the last evaluation; `{}` if there was only one.
    """
    headers = ("set", "n", "metric", "before [95 %]", "after [95 %]", "change [95 %]")
    return text_table(headers, [table_cells(row) for row in compare_scores(before, after)])


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows of cells as plain text with aligned columns under their headers."""
    rows = [headers, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def table_cells(row: Comparison) -> tuple[str, ...]:
    """Set, number of questions, metric, before, after and change as text."""
    num_questions = "-" if row.num_questions is None else str(row.num_questions)
    estimates = (interval_text(row.before), interval_text(row.after), interval_text(row.change, "+"))
    return (row.set_name, num_questions, row.metric, *estimates)


def interval_text(estimate: Estimate | None, sign: str = "") -> str:
    """Mean and 95 % interval as text, "-" for None; `sign` "+" writes the sign of positive numbers too."""
    if estimate is None:
        return "-"
    mean, low, high = (f"{value:{sign}.3f}" for value in estimate)
    return f"{mean} [{low}, {high}]"
