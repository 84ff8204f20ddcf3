"""Column layouts: accepted answers, contexts and choices in the question, worked solutions, named columns."""

import json

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from expo.config import DataSection, load_config
from expo.data import ReadOptions, load_questions, question_id
from expo.data.__main__ import main
from expo.errors import ConfigError
from expo.rewards.groups import grade
from expo.run.inputs import load_inputs
from expo.types import Prompt, Question, QuestionParts, Reply, Verdict


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path, *rows, **options):
    return load_questions(write(tmp_path / "q.jsonl", *rows), ReadOptions(**options))


def only(tmp_path, row, **options):
    (question,) = read(tmp_path, row, **options).questions
    return question


def verl(content, truth):
    return {"prompt": content, "reward_model": {"style": "rule", "ground_truth": truth}}


class ExactGrader:
    def __init__(self):
        self.calls = []

    def grade(self, replies, answers):
        self.calls.append(list(replies))
        pairs = zip(replies, answers, strict=True)
        return [Verdict("correct" if reply == gold else "wrong", reply) for reply, gold in pairs]


@pytest.mark.parametrize("truth", [["Paris", "City of Paris", "Paris"], {"target": ["Paris", "City of Paris"]}])
def test_any_of_verls_accepted_answers_is_right(tmp_path, truth):
    question = only(tmp_path, verl("The capital of France?", truth))
    assert question.golds == ("Paris", "City of Paris")
    grader = ExactGrader()
    replies = [[Reply([1], [0.0], False, text) for text in ("Paris", "City of Paris", "Lyon")]]
    graded = grade(grader, [Prompt(question, [1])], replies)
    assert [verdict.kind for verdict in graded.verdicts[0]] == ["correct", "correct", "wrong"]
    assert grader.calls == [["Paris", "City of Paris", "Lyon"], ["City of Paris", "Lyon"]]


def test_all_members_of_a_solution_set_are_needed(tmp_path):
    question = only(tmp_path, {"question": "Solve x^2 = 4", "final_answer": ["2", "-2"]})
    assert question.golds == ("2, -2",)


def test_an_accepted_answer_that_cannot_be_read_refuses_its_row(tmp_path):
    with pytest.raises(ConfigError, match=r"q\.jsonl:1 has no usable `reward_model`"):
        read(tmp_path, verl("1+1?", ["2", None]))


@pytest.mark.parametrize("column", ["context", "passage", "body", "Body"])
def test_a_context_is_part_of_the_question(tmp_path, column):
    row = {column: "Ann has 3 apples.", "question": "How many are left after 1?", "answer": "2"}
    assert only(tmp_path, row).text == "Ann has 3 apples.\n\nHow many are left after 1?"
    assert only(tmp_path, {**row, column: None}).text == "How many are left after 1?"


def test_svamp_and_asdiv_are_read(tmp_path):
    svamp = {"ID": "chal-1", "Body": "Ann has 3 apples.", "Question": "How many?", "Equation": "( 3 )", "Answer": "3.0"}
    parts = QuestionParts("How many?", "Ann has 3 apples.")
    text = "Ann has 3 apples.\n\nHow many?"
    assert only(tmp_path, svamp) == Question(question_id(text), text, "3.0", parts=parts)
    asdiv = {"body": "Ann has 9 apples.", "question": "How many?", "answer": "9 (apples)", "formula": "9=9"}
    assert only(tmp_path, asdiv).answer == "9"


MMLU = {"question": "2 + 2?", "subject": "arithmetic"}


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"choices": ["3", "4", "5"], "answer": 1}, "B"),
        ({"options": ["3", "4", "5"], "answer": "B", "answer_index": 1}, "B"),
        ({"options": ["A)3", "B)4", "C)5"], "answer": "B"}, "B"),
        ({"choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}, "answerKey": "B"}, "B"),
        ({"options": {"A": "3", "B": "4", "C": "5", "D": None}, "answer": "B"}, "B"),
        ({"choices": ["3", "4", "5"], "answer": "4"}, "B"),
        ({"choices": [3, 4, 5], "answer": 4}, "B"),
    ],
)
def test_choices_are_shown_and_the_answer_is_a_label(tmp_path, row, label):
    question = only(tmp_path, {**MMLU, **row})
    assert question.text == "2 + 2?\n(A) 3\n(B) 4\n(C) 5"
    assert question.answer == label


def test_choices_that_are_one_text_are_shown_as_they_are(tmp_path):
    question = only(tmp_path, {"question": "2 + 2?", "options": "a ) 3 , b ) 4", "answer": "b"})
    assert (question.text, question.answer) == ("2 + 2?\na ) 3 , b ) 4", "b")


@pytest.mark.parametrize("answer", [3, -1, "6", "D"])
def test_an_answer_that_is_no_choice_refuses_its_row(tmp_path, answer):
    with pytest.raises(ConfigError, match=r"q\.jsonl:1 has no usable `answer`"):
        read(tmp_path, {**MMLU, "choices": ["3", "4", "5"], "answer": answer})


@pytest.mark.parametrize("column", ["image", "images", "image_1", "decoded_image", "audio"])
def test_a_picture_refuses_its_row_by_name(tmp_path, column):
    row = {"question": "What is shown?", "answer": "2"}
    with pytest.raises(ConfigError, match=rf"q\.jsonl:1 has `{column}`, which a text model cannot be shown"):
        read(tmp_path, {**row, column: "a.png"})
    assert len(read(tmp_path, {**row, column: None}).questions) == 1


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    rows = [{"question": "1+1?", "answer": "2", "hint": "count", "source": None}]
    assert read(tmp_path, *rows).unread_columns == ("hint",)
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "1+1?", "answer": "2", "hint": "count"}]), path)
    assert load_questions(str(path)).unread_columns == ("hint",)
    assert main(["check", str(path)]) == 0
    assert "the columns hint are not used" in capsys.readouterr().out


def test_gsm8k_is_read(tmp_path):
    row = {"question": "How much?", "answer": "He has 2*9=<<2*9=18>>18 a day.\n#### 1,018"}
    assert only(tmp_path, row).answer == "1,018"
    with pytest.raises(ConfigError, match="no usable `answer`"):
        read(tmp_path, {**row, "answer": "He has 18.\n####"})


def test_math_is_read(tmp_path):
    row = {"problem": "What is $1/2 + 1/2$?", "level": "Level 1", "type": "Algebra"}
    question = only(tmp_path, {**row, "solution": r"First \boxed{0.5}, so it is $\boxed{\frac{2}{2}}$ in all."})
    assert (question.answer, question.level) == (r"\frac{2}{2}", "Level 1")
    with pytest.raises(ConfigError, match=r"q\.jsonl:1 has no usable `solution`"):
        read(tmp_path, {**row, "solution": "It is 1."})


def test_columns_may_be_named(tmp_path):
    row = {"q": "1+1?", "a": "2", "story": "Two.", "question": "not this", "answer": "3"}
    named = {"question": "q", "answer": "a", "context": "story"}
    question = only(tmp_path, row, columns=named)
    assert (question.text, question.answer) == ("Two.\n\n1+1?", "2")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert load_questions(str(path), ReadOptions(named)).questions == (question,)
    many = only(tmp_path, {"q": "1+1?", "a": ["2", "two"]}, columns={"question": "q", "accepted": "a"})
    assert many.golds == ("2", "two")
    worked = {"q": "1+1?", "a": r"So \boxed{2}"}
    assert only(tmp_path, worked, columns={"question": "q", "answer": "a"}).answer == "2"
    in_verls_form = {"q": "1+1?", "a": {"ground_truth": ["2", "two"]}}
    assert only(tmp_path, in_verls_form, columns={"question": "q", "answer": "a"}).golds == ("2", "two")
    left_out = only(tmp_path, {"question": "1+1?", "answer": "2", "context": "no"}, columns={"context": None})
    assert left_out.text == "1+1?"


def test_named_columns_that_are_missing_are_an_error_in_training_alone(tmp_path):
    row, columns = {"question": "1+1?", "answer": "2"}, {"question": "q", "answer": "a"}
    with pytest.raises(ConfigError, match=r"data\.columns names q, a, but .*q\.jsonl:1 has the columns question, ans"):
        read(tmp_path, row, columns=columns)
    assert read(tmp_path, row, columns=columns, needs_columns=False).questions[0].answer == "2"


def test_a_run_reads_the_columns_that_it_names(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"q": f"{n}+1=", "a": str(n + 1)} for n in range(3)))
    held_out = write(tmp_path / "held_out.jsonl", {"question": "4+4=", "answer": "8"})
    values = {
        "data.train": train,
        "data.columns": {"question": "q", "answer": "a"},
        "evaluation.sets": {"few": held_out},
        "rollout.questions_per_step": 2,
        "rollout.group_size": 2,
    }
    inputs = load_inputs(load_config(None, list(values.items())))
    assert [question.text for question in inputs.train.questions] == ["0+1=", "1+1=", "2+1="]
    assert inputs.evaluation["few"].questions[0].text == "4+4="


def test_unknown_columns_say_how_to_name_them(tmp_path):
    with pytest.raises(ConfigError, match=r"or name the columns: --data\.columns='\{question: COLUMN"):
        read(tmp_path, {"text": "1+1?", "label": "2"})


@pytest.mark.parametrize("columns", [{"question": "q"}, {"answer": "a"}, {"question": "q", "answer": "a", "tags": "t"}])
def test_columns_that_do_not_go_together_are_refused(columns):
    with pytest.raises(ValidationError):
        DataSection(train="x", columns=columns)


def test_the_data_command_reads_named_columns(tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", {"q": "1+1=", "a": "2"})
    assert main(["show", path, "--columns={question: q, answer: a}", "--model=ledger", "--no-chat-template"]) == 0
    assert "gold answer: 2 " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["check", path, "--columns={question: q}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
