"""Renders HTML pages with Jinja2: autoescape is on, so that no value can add markup to a page.

A page has no script and fetches nothing, so that it works offline and as an e-mail attachment.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from expo.reporting.comparison import Comparison, table_cells, wilson_notes


def _encode_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["base64"] = _encode_base64


@dataclass(frozen=True)
class Cell:
    """A mean and its interval as text; `interval` is "" if there is none."""

    mean: str
    interval: str


@dataclass(frozen=True)
class Row:
    """A row of a comparison table as text."""

    name: str
    num_questions: str
    is_first: bool  # of the rows of its set; only this one shows name and number of questions
    metric: str
    before: Cell
    after: Cell
    change: Cell
    trend: str  # CSS class of the change: "up" or "down" if it permits a claim, else ""
    remark: str  # on a change that permits none


@dataclass(frozen=True)
class Table:
    """A comparison table: headers of set, number of questions, metric, before, after and change; rows; notes below."""

    headers: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def render(template: str, **values: Any) -> str:
    """The HTML text of a template in this folder; every value is escaped."""
    return _ENVIRONMENT.get_template(template).render(values)


def comparison_table(
    comparisons: Sequence[Comparison], set_header: str, headers: Sequence[str] = ("Metric", "Before", "After", "Change")
) -> Table:
    """The table of `comparisons` as text.

    Args:
        comparisons: the rows; those of one set follow each other.
        set_header: header of the first column.
        headers: headers of metric, before, after and change.
    """
    rows, previous_set = [], None
    for comparison in comparisons:
        rows.append(_row(comparison, is_first=comparison.set_name != previous_set))
        previous_set = comparison.set_name
    intervals = " ".join(cell.interval for row in rows for cell in (row.before, row.after, row.change))
    return Table((set_header, "Questions", *headers), tuple(rows), tuple(wilson_notes(intervals)))


def _row(comparison: Comparison, *, is_first: bool) -> Row:
    name, num_questions, metric, *estimates = table_cells(comparison)
    before, after, change = (_cell(text) for text in estimates)
    return Row(name, num_questions, is_first, metric, before, after, change, comparison.trend, comparison.remark)


def _cell(text: str) -> Cell:
    mean, _, interval = with_minus_signs(text).partition(" ")
    return Cell(mean, interval) if interval else Cell("–", "")


def with_minus_signs(text: str) -> str:
    """`text` with typographic minus signs in place of hyphens."""
    return text.replace("-", "−")
