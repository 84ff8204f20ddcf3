"""Options, contexts and further columns: the forms in which tables hold them, and those that are refused by name."""

import pytest
from pydantic import ValidationError

from expo.config import DataSection
from expo.data import ReadOptions
from expo.errors import ConfigError
from tests.trainer.data.test_layouts import only, read

ASKED = {"question": "2 + 2?"}
SHOWN = (("A", "3"), ("B", "4"), ("C", "5"))


def columns(**named):
    return ReadOptions.of(DataSection(train="x", columns=named)).columns


@pytest.mark.parametrize(
    "row",
    [
        {"A": "3", "B": "4", "C": "5", "D": None, "answer": "B"},
        {"A": "3", "B": "4", "C": "5", "answer": 1},
        {"options": ["A. 3", "B. 4", "C. 5"], "answer": "B"},
        {"options": ["3", "4", "5"], "answer": "b"},
        {"options": ["3", "4", "5"], "answer": "(B)"},
        {"options": ["3", "4", "5"], "answer": "B."},
        {"options": ["3", "4", "5", None], "answer": 1.0},
        {
            "options": [{"label": "A", "text": "3"}, {"label": "B", "text": "4"}, {"text": "5", "label": "C"}],
            "answer": "B",
        },
        {"choices": {"text": ["3", "4", "5"]}, "answer": "4"},
        {"options": {"A": 3, "B": 4, "C": 5}, "answer": "B"},
    ],
)
def test_options_are_read_in_every_form(tmp_path, row):
    question = only(tmp_path, {**ASKED, **row})
    assert question.parts.options == SHOWN
    assert (question.text, question.answer) == ("2 + 2?\n(A) 3\n(B) 4\n(C) 5", "B")


def test_options_may_be_named(tmp_path):
    row = {"q": "2 + 2?", "opa": "3", "opb": "4", "opc": "5", "cop": 1, "options": "no", "passage": "no"}
    named = columns(question="q", answer="cop", options=["opa", "opb", "opc"], context=None)
    question = only(tmp_path, row, columns=named)
    assert (question.parts.options, question.parts.context, question.answer) == (SHOWN, "", "B")
    for holds in ("options", "choices"):
        row = {"q": "2 + 2?", "picks": ["3", "4", "5"], "a": "C"}
        assert only(tmp_path, row, columns=columns(question="q", answer="a", **{holds: "picks"})).answer == "C"
    bare = only(
        tmp_path, {**ASKED, "options": ["3", "4"], "A": "x", "B": "y", "answer": "4"}, columns=columns(options=None)
    )
    assert (bare.text, bare.answer, bare.parts) == ("2 + 2?", "4", None)


def test_an_index_counts_options_that_are_null(tmp_path):
    assert only(tmp_path, {**ASKED, "options": ["3", None, "4"], "answer": 2}).answer == "C"
    with pytest.raises(ConfigError, match="none of the options"):
        only(tmp_path, {**ASKED, "options": ["3", None, "4"], "answer": 1})


@pytest.mark.parametrize("options", [[], None, "", "  ", {}, [None]])
def test_no_options_leave_the_question_as_it_is(tmp_path, options):
    question = only(tmp_path, {**ASKED, "options": options, "answer": "4"})
    assert (question.text, question.answer) == ("2 + 2?", "4")


@pytest.mark.parametrize(
    "options",
    [7, True, [["3"], ["4"]], {"text": ["3", "4"], "label": ["A"]}, [{"text": "3"}], ["3"] * 27, {"x": {"y": 1}},
     {"text": ["3", "4"], "label": ["A", "A"]}],
)  # fmt: skip
def test_options_that_cannot_be_read_are_one_line(tmp_path, options):
    wanted = r"q\.jsonl:1 has no usable options in `options`: .*--data\.columns='\{options: null\}'$"
    with pytest.raises(ConfigError, match=wanted) as error:
        read(tmp_path, {**ASKED, "options": options, "answer": "4"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("Two.", "Two.\n\n2 + 2?"), (["Two.", "", " Three. "], "Two.\n\nThree.\n\n2 + 2?"), ("", "2 + 2?"),
        ("  ", "2 + 2?"), (None, "2 + 2?"), ([], "2 + 2?"), ("Zwölf 十二", "Zwölf 十二\n\n2 + 2?"),
    ],
)  # fmt: skip
def test_contexts_are_read(tmp_path, context, text):
    assert only(tmp_path, {**ASKED, "context": context, "answer": "4"}).text == text


@pytest.mark.parametrize("context", [{"contexts": ["a"]}, 7, [1], [["a"]]])
def test_a_context_that_cannot_be_read_is_one_line(tmp_path, context):
    row = {**ASKED, "context": context, "answer": "4"}
    with pytest.raises(ConfigError, match=r"no usable context in `context`: .*'\{context: null\}'$"):
        read(tmp_path, row)
    assert only(tmp_path, row, columns=columns(context=None)).text == "2 + 2?"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "1+1?", "answer": "2"}, "2"),
        ({"prompt": "1+1?", "ground_truth": "2"}, "2"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "ground_truth": ["2", "two"]}, "2"),
        ({"problem": "1+1?", "solution": "1 and 1.\n#### 2"}, "2"),
        ({"question": "1+1?", "solution": r"It is \boxed{2}."}, "2"),
        ({"problem": "1+1?", "solution": r"It is \boxed{3}.", "answer": "2"}, "2"),
        ({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "2"),
    ],
)
def test_the_columns_of_known_sets_need_no_setting(tmp_path, row, answer):
    question = only(tmp_path, row)
    assert (question.text, question.answer, question.parts) == ("1+1?", answer, None)


@pytest.mark.parametrize(
    "named",
    [
        {"options": "a", "choices": "b"}, {"context": ["a"]}, {"question": ["q"], "answer": "a"}, {"options": []},
        {"options": ["a"] * 27}, {"context": ""},
    ],
)  # fmt: skip
def test_columns_that_make_no_sense_are_refused(named):
    with pytest.raises(ValidationError):
        DataSection(train="x", columns=named)


def test_a_missing_column_of_an_option_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.columns names opz, but"):
        read(
            tmp_path,
            {"q": "2?", "a": "A", "opa": "2"},
            columns=columns(question="q", answer="a", options=["opa", "opz"]),
        )
