"""Question files that are damaged or unusual: one line that names the row, or the value that was meant."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from expo.data import ReadOptions, load_questions, only_gradable
from expo.data.__main__ import main
from expo.data.record import set_record
from expo.errors import ConfigError

FINE = '{"question": "1+1?", "answer": "2"}\n'


def file_of(tmp_path, *lines):
    path = tmp_path / "q.jsonl"
    path.write_bytes("".join(line if line.endswith("\n") else f"{line}\n" for line in lines).encode("utf-8"))
    return str(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert len(load_questions(file_of(tmp_path, "\ufeff" + FINE)).questions) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (r'{"question": "what is \ud83d?", "answer": "2"}', "half of a surrogate pair"),
        (r'{"question": "1+1?", "answer": "\uDE00"}', "half of a surrogate pair"),
        ('{"question": "1+1?", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question": "1+1?", "answer": ' + "1" * 5_000 + "}", "a number that cannot be read"),
        ('{"question": "1+1?", "answer": NaN}', "a number that cannot be read: NaN"),
        ('{"question": "1+1?", "answer": -Infinity}', "a number that cannot be read: -Infinity"),
    ],
)
def test_a_line_that_cannot_be_used_is_one_line_of_text(tmp_path, capsys, line, problem):
    path = file_of(tmp_path, FINE, line)
    with pytest.raises(SystemExit) as stop:
        main(["check", path])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}:2 " in error
    assert problem in error
    assert error.count("\n") == 1
    assert len(error) < 500


def test_whole_surrogate_pairs_are_read(tmp_path):
    (question,) = load_questions(file_of(tmp_path, r'{"question": "\ud83d\ude00?", "answer": "2"}')).questions
    assert question.text == "\U0001f600?"


@pytest.mark.parametrize("text", ["(" * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5_000, "\\boxed{" * 20_000])
def test_an_answer_of_any_length_is_left_out_or_named_in_short(tmp_path, text):
    loaded = load_questions(file_of(tmp_path, FINE, json.dumps({"question": "3?", "answer": text})))
    with pytest.raises(ConfigError) as error:
        only_gradable(loaded, skip_bad_answers=False)
    assert len(str(error.value)) < 500
    assert only_gradable(loaded, skip_bad_answers=True).num_bad_answers == 1


def test_decimals_keep_their_digits(tmp_path):
    path = file_of(tmp_path, '{"question": "1?", "answer": 0.12345678901234567890}')
    assert load_questions(path).questions[0].answer == "0.12345678901234567890"


@pytest.mark.parametrize("kind", [pyarrow.float32(), pyarrow.float16(), pyarrow.float64()])
def test_narrow_floats_of_parquet_have_the_decimals_that_were_written(tmp_path, kind):
    values = np.array([0.1, 142.0], {"float": np.float32, "halffloat": np.float16}.get(str(kind), np.float64))
    golds = pyarrow.array(values, kind)
    table = pyarrow.table({"question": ["1?", "2?"], "answer": golds})
    parquet.write_table(table, tmp_path / "q.parquet")
    assert [q.answer for q in load_questions(str(tmp_path / "q.parquet")).questions] == ["0.1", "142.0"]


def test_narrow_floats_inside_lists_and_structs_too(tmp_path):
    kind = pyarrow.struct([("ground_truth", pyarrow.list_(pyarrow.float32()))])
    table = pyarrow.table(
        {"prompt": ["1?"], "reward_model": pyarrow.array([{"ground_truth": [0.1, 2.5]}], kind)},
    )
    parquet.write_table(table, tmp_path / "q.parquet")
    assert load_questions(str(tmp_path / "q.parquet")).questions[0].golds == ("0.1", "2.5")


BAD_VALUES = [None, "", "  ", [], [None], True, {}]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_one_row_without_an_answer_does_not_refuse_the_set(tmp_path, value):
    path = file_of(tmp_path, FINE, json.dumps({"question": "2+2?", "answer": value}))
    with pytest.raises(ConfigError, match=r"q\.jsonl:2 has no usable `answer`.*--data\.skip_bad_answers=true"):
        load_questions(path)
    loaded = only_gradable(load_questions(path, ReadOptions(skip_bad_answers=True)), skip_bad_answers=True)
    record = set_record(loaded, num_long=0)
    assert (record["questions"], record["left_out"]["with answers that cannot be parsed"]) == (1, 1)
    assert "1 rows without a usable answer are left out" in record["notes"][-1]
    assert "q.jsonl:2" in record["notes"][-1]
    assert loaded.num_rows == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_count_as_missing_in_parquet(tmp_path, number):
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"question": ["1?", "2?"], "answer": [1.0, number]}), path)
    with pytest.raises(ConfigError, match=r"q\.parquet:2 has no usable `answer`"):
        load_questions(str(path))
    assert load_questions(str(path), ReadOptions(skip_bad_answers=True)).num_bad_answers == 1


def test_a_set_without_any_answer_is_refused(tmp_path):
    path = file_of(tmp_path, '{"question": "1?", "answer": null}')
    with pytest.raises(ConfigError, match=r"no row of .* has a usable answer"):
        load_questions(path, ReadOptions(skip_bad_answers=True))


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"question": ["1?"] * 1000, "answer": ["1"] * 1000}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match=r"cannot read the question file .*q\.parquet: .+") as error:
        load_questions(str(path))
    assert "\n" not in str(error.value)
