"""Progress with and without a terminal."""

import io

import pytest
from rich.console import Console

from expo.run.metrics import progress_note, share_text
from expo.runtime.console import GAP, Display

ROW = {
    "accuracy": 0.4921875, "unparsed_fraction": 0.0312, "truncated_fraction": 0.001, "kl": 0.02254, "entropy": 0.324,
    "completion_length": 10.7, "tokens_per_second": 1676.3,
}  # fmt: skip
LARGE = {
    **dict.fromkeys(("accuracy", "unparsed_fraction", "truncated_fraction"), 0.998), "kl": 1234.5678, "entropy": 12.345,
    "completion_length": 131072.0, "tokens_per_second": 1234567.8,
}  # fmt: skip


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Display().bar("replies", total=100) as bar:
        for _ in range(100):
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("replies 100/100")


@pytest.mark.parametrize(("row", "total"), [(ROW, 6), (ROW, 150), (ROW, 100_000), (LARGE, 150), (LARGE, 1_000_000)])
def test_a_plain_step_line_fits_80_columns_with_the_shares(row, total, capsys):
    with Display().bar("step", total, done=total - 1) as bar:
        bar.advance(note=progress_note(row))
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 80
    assert line.startswith(f"step {total}/{total}  acc {row['accuracy']:.3f}  unparsed ")
    assert "truncated " in line
    assert line.endswith("  0 s left")


def test_an_alarm_is_said_whole_in_a_plain_line(capsys):
    signs = ["gradient 0 for 40 updates", "KL above run.collapse_kl = 10 for 3 steps"]
    with Display().bar("step", 9) as bar:
        bar.advance(note=progress_note({**ROW, "truncated_fraction": 1.0}, signs))
    (line,) = capsys.readouterr().out.splitlines()
    assert f"COLLAPSE: {', '.join(signs)}  ALL REPLIES TRUNCATED  " in line


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (1e-4, "<1%"), (0.005, "<1%"), (0.031, "3%"), (0.99, "99%"), (0.9951, ">99%"), (1.0, "100%")],
)
def test_a_share_that_is_not_all_or_nothing_does_not_read_so(share, text):
    assert share_text(share) == text


def shown_on_a_terminal(row, width, signs=(), name="step", total=150):
    """The last state of a live progress line."""
    display, file = Display(), io.StringIO()
    display._console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with display.bar(name, total, done=total - 1) as bar:
        bar.advance(**({} if row is None else {"note": progress_note(row, signs)}))
    lines = [line for line in file.getvalue().replace("\r", "\n").splitlines() if name in line]
    return lines[-1].split("\x1b[2K")[-1].rstrip()


@pytest.mark.parametrize("row", [ROW, LARGE])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_live_step_line_is_never_cut_in_a_metric(row, width):
    line = shown_on_a_terminal(row, width)
    assert len(line) <= width
    note = progress_note(row)
    told = [metric for metric in note.metrics if metric in line]
    assert line.endswith(GAP.join(told))
    assert tuple(told) == note.metrics[: len(told)]
    assert len(told) >= {40: 1, 60: 2, 80: 3, 100: 3, 120: 5, 200: 7}[width]
    assert "…" not in line
    assert ("━" in line) is (width >= 100)


def test_progress_without_a_note_keeps_its_bar_on_a_narrow_terminal():
    assert "━" in shown_on_a_terminal(None, 60, name="replies")


def test_a_long_alarm_is_cut_only_at_the_end_of_a_live_line():
    line = shown_on_a_terminal(ROW, 60, signs=["KL above run.collapse_kl = 10 for 3 steps"])
    assert "COLLAPSE: KL above" in line
    assert line.endswith("…")
    assert len(line) <= 60
