"""Logs at a checkpoint: what a resumed run cuts, keeps and reports, and that no line raises an error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo.run.logs import LOGS, LogState, cut, parse_object, parse_row


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = lines({"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.25}, {"step": 3, "kl": 1.5})
AT_CHECKPOINT = LogState().extended(ROWS)


def test_a_state_grows_with_what_is_appended():
    grown = LogState().extended(ROWS[:7]).extended(ROWS[7:])
    assert grown == AT_CHECKPOINT
    assert grown.lines == 3
    assert grown.begins(ROWS + b"more")
    assert not grown.begins(ROWS[:-1])


def test_a_whole_log_is_cut_at_the_checkpoint_without_a_message():
    assert cut("metrics", ROWS + lines({"step": 4}) + b'{"st', 3, AT_CHECKPOINT) == (ROWS, None)


@pytest.mark.parametrize("name", LOGS)
def test_rows_written_after_the_checkpoint_are_not_trusted(name):
    before = lines({"step": 0})
    for later in ({"step": 0}, {"step": 3, "sets": {}}, {"step": 4}):
        assert cut(name, before + lines(later), 3, LogState().extended(before)) == (before, None)


def test_lines_that_were_appended_twice_are_written_once():
    assert cut("metrics", ROWS + ROWS, 3, AT_CHECKPOINT) == (ROWS, None)


DAMAGED = {
    "lost": (b"", 0),
    "cut": (ROWS[:-5], 2),
    "a line removed": (ROWS.split(b"\n", 1)[1], 2),
    "a number changed": (ROWS.replace(b"0.25", b"0.75"), 3),
    "garbage in a line": (ROWS.replace(b'{"step": 2', b'\xff{"step": 2'), 2),
    "other lines of the same steps": (ROWS.replace(b"0.5", b"0.6") + ROWS, 3),
    "of another run": (lines({"step": True}, {"step": "1"}, {"loss": 1}, [1], None), 0),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_log_that_lost_or_changed_lines_is_reported_and_keeps_the_others(name):
    content, num_kept = DAMAGED[name]
    content += lines({"step": 4}) if content else b""
    kept, message = cut("metrics", content, 3, AT_CHECKPOINT)
    assert message == (
        f"warning: metrics.jsonl is not as the checkpoint of step 3 recorded it; {num_kept} of its 3 lines can be read "
        f"and are kept"
    )
    assert kept.count(b"\n") == num_kept
    assert all(parse_row(line)["step"] <= 3 for line in kept.split(b"\n")[:-1])


def test_without_a_recorded_state_whole_rows_are_kept():
    kept = lines({"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.25})
    assert cut("metrics", b"garbage\n" + ROWS, 2, None) == (kept, None)


@given(st.one_of(st.text(), st.binary()))
def test_no_text_raises_an_error(text):
    assert isinstance(parse_object(text), dict)


HOSTILE = ["[" * 200_000, '{"a":' * 200_000, '{"step": ' + "9" * 5000 + "}", '{"step": NaN}', '{"step": true}', ""]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_json_is_no_object_of_a_log(text):
    assert parse_row(text) == {}
