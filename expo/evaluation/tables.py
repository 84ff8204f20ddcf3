"""The scores of an evaluation as a text table."""

from collections.abc import Mapping
from typing import Any

from expo.evaluation.scores import powers_of_two
from expo.reporting import clean
from expo.reporting.comparison import Estimate, interval_text, text_table, wilson_notes

FRACTIONS = ("truncated", "unparsed", "timeout")


def estimates_of(scores: Mapping[str, Any], n: int) -> dict[str, Estimate]:
    """The metrics of a set by name: pass@k at powers of two, and maj@n.

    Raises: ValueError if one is no mean with its interval.
    """
    named = {f"pass@{k}": scores["pass_at"][str(k)] for k in powers_of_two(n)}
    return {name: _estimate(name, value) for name, value in {**named, f"maj@{n}": scores["maj_at_n"]}.items()}


def _estimate(name: str, value: Any) -> Estimate:
    found = clean.estimate(value)
    if found is None:
        raise ValueError(f"{name} has no finite mean, low and high")
    return Estimate(**found)


def fractions_text(scores: Mapping[str, Any]) -> str:
    """The fractions of a set's replies that were truncated, unparsed or timed out."""
    return ", ".join(f"{scores[f'{name}_fraction']:.1%} {name}" for name in FRACTIONS)


def scores_table(scores: Mapping[str, Mapping[str, Any]], n: int) -> str:
    """The metrics of every set with their 95 % intervals, and below them statistics of its replies."""
    rows, notes = [], []
    for name, of_set in scores.items():
        estimates = estimates_of(of_set, n)
        rows += [(name, str(of_set["num_questions"]), metric, interval_text(e)) for metric, e in estimates.items()]
        notes.append(f"{name}: {fractions_text(of_set)}, {of_set['mean_length']:.1f} tokens a reply")
    notes.append(f"{n} replies a question; pass@1 is mean@{n}")
    table = text_table(("set", "questions", "metric", "mean [95 %]"), rows)
    return "\n".join([table, *wilson_notes(table), *notes])
