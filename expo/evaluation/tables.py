"""The scores of an evaluation as a text table."""

from collections.abc import Mapping
from typing import Any

from expo.evaluation.scores import powers_of_two
from expo.reporting.comparison import Estimate, interval_text, text_table

SHARES = ("truncated", "unparsed", "timeout")


def estimates_of(found: Mapping[str, Any], n: int) -> dict[str, Estimate]:
    """The numbers of a table, by name: pass@k at powers of two, of which the first is mean@n, and maj@n."""
    named = {f"pass@{k}": found["pass_at"][str(k)] for k in powers_of_two(n)}
    return {name: Estimate(**value) for name, value in {**named, f"maj@{n}": found["maj_at_n"]}.items()}


def scores_table(scores: Mapping[str, Mapping[str, Any]], n: int) -> str:
    """Every set with its numbers and 95 % intervals, then what became of its replies."""
    rows, notes = [], []
    for name, found in scores.items():
        estimates = estimates_of(found, n)
        rows += [(name, str(found["num_questions"]), metric, interval_text(e)) for metric, e in estimates.items()]
        shares = ", ".join(f"{found[f'{share}_fraction']:.1%} {share}" for share in SHARES)
        notes.append(f"{name}: {shares}, {found['mean_length']:.1f} tokens a reply")
    notes.append(f"{n} replies a question; pass@1 is mean@{n}")
    return "\n".join([text_table(("set", "questions", "metric", "mean [95 %]"), rows), *notes])
