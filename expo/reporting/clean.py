"""What can be shown of values that a run's files should hold: other types and sizes are left out.

The files may be damaged, or written by somebody else; whatever they hold, a report is drawn from the rest.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from expo.reporting.comparison import BOOTSTRAP, WILSON

MOST = 1e15  # larger numbers are no metric, and their axes have no ticks
MOST_STEPS = 2**31

T = TypeVar("T")
Record = dict[str, Any]


def number(value: Any) -> float | None:
    """The value as a float; None unless it is a finite number of a size that a figure can show."""
    if not isinstance(value, int | float) or not -MOST <= value <= MOST:
        return None
    return float(value)


def mapping(value: Any) -> Record:
    """The value if it is an object; otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """The value if it is a list; otherwise an empty one."""
    return value if isinstance(value, list) else []


def is_step(value: Any) -> bool:
    """Whether the value numbers a step."""
    return type(value) is int and 0 <= value < MOST_STEPS


def estimate(value: Any) -> dict[str, Any] | None:
    """A mean with its interval, and how the interval was made if that is recorded; None if a number is missing."""
    numbers = {name: number(mapping(value).get(name)) for name in ("mean", "low", "high")}
    known: Record = {name: found for name, found in numbers.items() if found is not None}
    if len(known) < len(numbers):
        return None
    interval = mapping(value).get("interval")
    return {**known, "interval": interval} if interval in (BOOTSTRAP, WILSON) else known


def scores(value: Any) -> Record:
    """The scores of an evaluation: what of each set has the form that `expo.evaluation.scores` writes."""
    return _valid(mapping(value), _set_scores)


def _set_scores(value: Any) -> Record | None:
    if not isinstance(value, dict):
        return None
    kept: Record = {"pass_at": _pass_at(value), "by_level": _valid(mapping(value.get("by_level")), _level_scores)}
    if is_step(value.get("num_questions")):
        kept["num_questions"] = value["num_questions"]
    return kept


def _level_scores(value: Any) -> Record | None:
    found = _set_scores(value)
    return None if found is None else {name: part for name, part in found.items() if name != "by_level"}


def _pass_at(value: Record) -> Record:
    estimates = _valid(mapping(value.get("pass_at")), estimate)
    return {k: found for k, found in estimates.items() if re.fullmatch(r"[1-9]\d{0,6}", k, flags=re.ASCII)}


def _valid(values: Mapping[str, Any], clean: Callable[[Any], T | None]) -> dict[str, T]:
    """The values that `clean` can use, by name."""
    cleaned = {name: clean(value) for name, value in values.items()}
    return {name: value for name, value in cleaned.items() if value is not None}


def histogram(value: Any) -> list[float]:
    """A histogram's counts; empty if one of them is no count."""
    counts = [number(count) for count in listing(value)]
    known = [count for count in counts if count is not None and count >= 0]
    return known if len(known) == len(counts) and math.fsum(known) <= MOST else []


def label(text: str) -> str:
    """A name as matplotlib can draw it: without control characters, and without formulas between dollar signs."""
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return shown.replace("$", r"\$")
