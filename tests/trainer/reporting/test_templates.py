"""Pages escape every value and forbid scripts and external resources."""

import re
from pathlib import Path

import jinja2
import pytest
from markupsafe import escape

from expo.reporting import templates
from expo.reporting.comparison import Comparison, Estimate
from expo.reporting.figures import RenderedFigure
from expo.reporting.templates import comparison_table, render
from tests.trainer.reporting.run_folders import HOSTILE

TEMPLATES = sorted(Path(templates.__file__).parent.glob("*.j2"))


def compare_page(text: str) -> str:
    """The page of two evaluations with `text` in the place of every value."""
    estimate = Estimate(0.5, 0.4, 0.6)
    table = comparison_table([Comparison(text, 3, text, estimate, estimate, estimate)], text, [text] * 4)
    figures = [RenderedFigure(text, text, text, True, b"png"), RenderedFigure(text, text, text, False, None)]
    names = ("title", "label_a", "label_b")
    return render(
        "compare.html.j2",
        **dict.fromkeys(names, text),
        other_differences=[text],
        scores=table,
        figures=figures,
        reply_shares={text: text},
        protocol={text: text},
    )


def test_every_value_is_escaped() -> None:
    hostile = f'"><img src=x onerror=alert(1)>{HOSTILE}'
    page = compare_page(hostile)
    assert "<script" not in page
    assert "<img src=x" not in page
    # every value that the template was given appears, each in its escaped form
    assert page.count(escape(hostile)) == compare_page("plain text").count("plain text") > 20


def test_no_template_turns_escaping_off() -> None:
    assert len(TEMPLATES) == 4
    for path in TEMPLATES:
        assert not re.search(r"\|\s*safe|autoescape", path.read_text(encoding="utf-8")), path


def test_every_page_forbids_scripts_and_external_resources() -> None:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in compare_page("text")
    assert not re.search(r"https?://|<script|<link|@import|url\(", compare_page("text"))


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="label_a"):
        render("compare.html.j2", title="title")


def test_a_change_is_marked_if_its_interval_excludes_zero() -> None:
    changes = [(0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.1, 0.0, 0.2)]
    comparisons = [Comparison("set", 30, "pass@1", None, None, Estimate(*change)) for change in changes]
    rows = comparison_table(comparisons, "Set").rows
    assert [row.trend for row in rows] == ["up", "down", ""]
    assert [row.remark for row in rows] == ["", "", "too few to tell"]
    assert [row.is_first for row in rows] == [True, False, False]
    assert (rows[1].change.mean, rows[1].change.interval) == ("−0.100", "[−0.150, −0.050]")
    assert (rows[0].before.mean, rows[0].before.interval) == ("–", "")
