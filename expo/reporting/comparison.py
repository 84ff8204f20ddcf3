"""pass@k before and after training, with 95 % intervals: the numbers and the plain-text table."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Scores = dict[str, Any]  # the scores of one evaluation: set name -> {"num_questions", "pass_at", "by_level", ...}

TABLE_KS = (1, 8, 32)  # the values of k that tables show
BOOTSTRAP, WILSON = "bootstrap", "wilson"  # how an interval was made
TOO_FEW = "too few to tell"
FEWEST_TO_TELL = 6  # questions that differ: with five, all in one direction, the sign test has p = 2 * 0.5^5 > 0.05
WILSON_MARK = "*"
WILSON_NOTE = (
    f"{WILSON_MARK} Wilson's interval with n = questions: scores of 0 and 1 only, or too few different ones for a "
    "bootstrap"
)


class Estimate(NamedTuple):
    """A mean with its 95 % interval, and how that was made: "bootstrap", "wilson", or "" if it is not recorded."""

    mean: float
    low: float
    high: float
    interval: str = ""


class Comparison(NamedTuple):
    """One row of a table: one metric of one evaluation set, before and after, and the change.

    num_differing: questions of a paired comparison whose scores differ; None if it is not paired.
    """

    set_name: str
    num_questions: int | None
    metric: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None
    num_differing: int | None = None

    @property
    def trend(self) -> str:
        """What the change permits to claim: "up" or "down" if its interval excludes 0 and enough questions make it up,
        else ""; "" too without a change.
        """
        if self.change is None or self.change.low <= 0 <= self.change.high:
            return ""
        num = self.num_questions if self.num_differing is None else self.num_differing
        if num is not None and num < FEWEST_TO_TELL:
            return ""
        return "up" if self.change.mean > 0 else "down"

    @property
    def remark(self) -> str:
        """`TOO_FEW` if there is a change that permits no claim, else ""."""
        return TOO_FEW if self.change is not None and not self.trend else ""


def pass_at(scores: dict[str, Any], k: int | str) -> Estimate | None:
    """pass@k of one set or level; None where it was not evaluated."""
    value = scores.get("pass_at", {}).get(str(k))
    return Estimate(**value) if value else None


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
    mean, interval = after.mean - before.mean, WILSON if WILSON in (before.interval, after.interval) else ""
    low = mean - math.hypot(after.mean - after.low, before.high - before.mean)
    high = mean + math.hypot(after.high - after.mean, before.mean - before.low)
    return Estimate(mean, low, high, interval)


def results_table(before: Scores, after: Scores) -> str:
    """The plain-text table of pass@k before and after, with 95 % intervals; without scores it has no rows.

    Args:
        before: the sets of the first evaluation, as in `evaluations.jsonl`.
        after: the sets of the last evaluation; `{}` if there was only one.
    """
    headers = ("set", "n", "metric", "before [95 %]", "after [95 %]", "change [95 %]")
    return comparison_text(headers, compare_scores(before, after))


def comparison_text(headers: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a plain-text table, with a note below it if it has Wilson's intervals."""
    cells = [table_cells(row) for row in comparisons]
    remarks = [f"{row[-1]} {item.remark}".rstrip() for row, item in zip(cells, comparisons, strict=True)]
    table = text_table(headers, [(*row[:-1], remark) for row, remark in zip(cells, remarks, strict=True)])
    return "\n".join([table, *wilson_notes(table)])


def wilson_notes(text: str) -> list[str]:
    """The note that explains the marks of Wilson's intervals; none if the text has no mark."""
    return [WILSON_NOTE] if f"]{WILSON_MARK}" in text else []


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
    """Mean and 95 % interval as text, "-" for None; `sign` "+" writes the sign of positive numbers too.

    Wilson's intervals have a mark, which `WILSON_NOTE` explains.
    """
    if estimate is None:
        return "-"
    mean, low, high = (f"{value:{sign}.3f}" for value in estimate[:3])
    return f"{mean} [{low}, {high}]{WILSON_MARK if estimate.interval == WILSON else ''}"
