"""Questions: duplicate rows, conflicting answers, ungradable answers, and prompts."""

import json
from pathlib import Path

import pytest

from expo.config import DataSection, ModelSection, load_config
from expo.data import PROMPTS, load_questions, only_gradable, question_id, render_prompt, render_prompts
from expo.errors import ConfigError
from expo.learner.model import load_model
from expo.run.inputs import load_inputs
from expo.train import train
from expo.types import Question


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class WordTokenizer:
    """One id per word; the chat template puts 1 before and 2 after."""

    chat_template = "words"

    def __call__(self, text):
        return {"input_ids": [10 + len(word) for word in text.split()]}

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert return_dict
        assert [message["role"] for message in messages] == ["user"]
        return {"input_ids": [1, *self(messages[0]["content"])["input_ids"], 2]}


def test_a_repeated_file_gives_each_question_once(tmp_path):
    rows = [{"question": f"1+{n}", "answer": n + 1} for n in range(5)]
    loaded = load_questions(write(tmp_path / "q.jsonl", *(rows * 100)))
    assert [question.answer for question in loaded.questions] == ["1", "2", "3", "4", "5"]
    assert loaded.num_duplicates == 495
    (note,) = loaded.notes
    assert "500 rows hold 5 questions, each 100 times" in note


def test_ids_depend_on_the_text_alone():
    assert question_id("What  is\n1+1? ") == question_id("What is 1+1?")
    assert question_id("Poincare\u0301's") == question_id("Poincar\u00e9's")
    assert question_id("1+1") != question_id("1+2")


def test_given_ids_and_levels_are_kept(tmp_path):
    loaded = load_questions(write(tmp_path / "q.jsonl", {"question": "a", "answer": "b", "id": 7, "level": "hard"}))
    assert loaded.questions == (Question("7", "a", "b", "hard"),)


def test_rows_with_equal_texts_are_one_question_even_with_other_ids(tmp_path):
    rows = [{"question": "1 + 1", "answer": "2", "id": name} for name in ("a", "b")]
    loaded = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert ([question.id for question in loaded.questions], loaded.num_duplicates) == (["a"], 1)


def test_questions_with_conflicting_answers_are_left_out(tmp_path):
    rows = [
        {"question": "1+1", "answer": "2"},
        {"question": "1+2", "answer": "3"},
        {"question": "1 + 3", "answer": "4"},
        {"question": "1+2", "answer": "5"},
        {"question": "1  +  3", "answer": "4.0"},
    ]
    loaded = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert [question.text for question in loaded.questions] == ["1+1", "1 + 3"]
    assert (loaded.num_duplicates, loaded.num_conflicts) == (2, 1)
    assert question_id("1+2") in loaded.notes[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no questions"),
        ('{"question": "a", "answer": "b"}\n{"question": ', "q.jsonl:2 is not JSON"),
        ("[1]", "q.jsonl:1 is not an object"),
        ('{"quest": "a", "answer": "b"}', "q.jsonl:1 has the columns quest, answer; expected one of: "),
        ('{"question": "a"}', "q.jsonl:1 has the columns question; expected one of: "),
        ('{"question": "a", "answer": "b"}\n{"question": "c"}', "q.jsonl:2 has no usable `answer`"),
        ('{"question": " ", "answer": "b"}', "q.jsonl:1 has no usable `question`"),
        ('{"question": "a", "answer": true}', "q.jsonl:1 has no usable `answer`"),
        ('{"question": "a", "answer": "1", "id": 1}\n{"question": "b", "answer": "1", "id": 1}', "q.jsonl:2: the id 1"),
        (
            '{"question": "a", "answer": "1"}\n{"question": "a", "answer": "2"}',
            "none of which can be trusted: ca978112ca1bbdca; give each question one answer",
        ),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, expected):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"q\.jsonl") as error:
        load_questions(str(path))
    assert expected in str(error.value)


def test_a_missing_file_names_the_nearest_set():
    with pytest.raises(ConfigError, match="did you mean ledger:train"):
        load_questions("ledger:trian")


def test_built_in_sets_share_no_question():
    sets = [{q.id for q in load_questions(f"ledger:{name}").questions} for name in ("train", "held_out", "beyond")]
    assert len(sets[0]) >= 1000
    assert sum(len(ids) for ids in sets) == len(set.union(*sets))


def test_answers_that_cannot_be_parsed_are_refused_or_left_out_by_name(tmp_path):
    rows = [
        {"question": "one", "answer": r"\frac{1}{2}", "id": "fine"},
        {"question": "two", "answer": r"\frac{1}{", "id": "broken"},
    ]
    loaded = load_questions(write(tmp_path / "q.jsonl", *rows))
    with pytest.raises(ConfigError, match=r"broken .*skip_bad_answers=true"):
        only_gradable(loaded, skip_bad_answers=False)
    kept = only_gradable(loaded, skip_bad_answers=True)
    assert ([question.id for question in kept.questions], kept.num_bad_answers) == (["fine"], 1)
    assert "broken" in kept.notes[-1]


@pytest.fixture(scope="module")
def run_on_repeated_questions(tmp_path_factory):
    """One step on a file of 6 questions, 100 times each; one of them is evaluated, another is too long."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": text, "answer": "5"} for text in ("2+3=", "9-4=", "1+4=", "7-2=", "8-3=", "6-1+9-9" * 9)]
    values = {
        "data.train": write(folder / "train.jsonl", *(rows * 100)),
        "data.drop_overlap": "exact",
        "evaluation.sets": {"few": write(folder / "few.jsonl", {"question": "2 + 3 =", "answer": "5"})},
        "evaluation.num_samples": 1,
        "rollout.questions_per_step": 2,
        "rollout.group_size": 2,
        "run.steps": 1,
        "run.dir": str(folder / "run"),
        "optimizer.warmup_steps": 0,
    }
    config = load_config(None, list(values.items()))
    return config, train(config)


def test_the_curriculum_holds_unique_questions(run_on_repeated_questions):
    _, run = run_on_repeated_questions
    (row,) = [json.loads(line) for line in (run / "curriculum.jsonl").read_text().splitlines()]
    assert row["num_questions"] == 4


def test_the_run_folder_records_what_was_left_out(run_on_repeated_questions):
    _, run = run_on_repeated_questions
    record = json.loads((run / "data.json").read_text())
    assert set(record["sets"]) == {"data.train", "evaluation.sets.few"}
    left_out = record["sets"]["data.train"]["left_out"]
    assert {reason: count for reason, count in left_out.items() if count} == {
        "duplicate rows": 594, "that overlap with evaluation": 1, "with too long a prompt": 1,
    }  # fmt: skip
    (match,) = record["overlap"]
    assert (match["set"], match["kind"], match["training_id"]) == ("few", "exact", question_id("2+3="))


def test_a_run_does_not_resume_with_other_questions(run_on_repeated_questions):
    config, _ = run_on_repeated_questions
    with Path(config.data.train).open("a") as file:
        file.write('{"question": "3+3=", "answer": "6"}\n')
    with pytest.raises(ConfigError, match=r"the questions of data\.train are not those"):
        train(config, resume=True)


def test_overlap_is_only_reported_by_default(run_on_repeated_questions):
    config, _ = run_on_repeated_questions
    section = config.data.model_copy(update={"drop_overlap": "none"})
    inputs = load_inputs(config.model_copy(update={"data": section}))
    assert question_id("2+3=") in {question.id for question in inputs.train.questions}
    assert len(inputs.overlap.matches) == 1


@pytest.mark.parametrize("name", PROMPTS)
def test_every_template_contains_the_question_even_with_braces(name):
    section = DataSection(train="x", prompt=name, chat_template=False)
    question = Question("1", "what is {1} in \\boxed{2}?", "1")
    words = len(PROMPTS[name].replace("{question}", question.text).split())
    assert len(render_prompt(question, section, WordTokenizer())) == words


def test_chat_template_wraps_one_user_message():
    section = DataSection(train="x", prompt="plain", chat_template=True)
    assert render_prompt(Question("1", "ab c", "1"), section, WordTokenizer()) == [1, 12, 11, 2]


def test_long_prompts_are_left_out():
    section = DataSection(train="x", prompt="plain", chat_template=False, max_prompt_tokens=2)
    kept = render_prompts([Question("1", "a b c", "1"), Question("2", "a b", "1")], section, WordTokenizer())
    assert [prompt.question.id for prompt in kept] == ["2"]
    with pytest.raises(ConfigError, match="the shortest has 3 tokens"):
        render_prompts([Question("1", "a b c", "1")], section, WordTokenizer())


def test_an_evaluation_set_with_long_prompts_is_refused_before_a_model_loads(tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in ("1=", "1" * 60 + "=")))
    config = load_config(None, [("evaluation.sets", {"few": str(few)}), ("data.train", str(few))])
    wanted = r"evaluation\.sets\.few: the prompts of 1 questions are longer than data\.max_prompt_tokens = 32"
    with pytest.raises(ConfigError, match=rf"{wanted}, .*; raise it to \d\d$"):
        load_inputs(config.model_copy(update={"rollout": config.rollout.model_copy(update={"questions_per_step": 1})}))


def test_a_missing_chat_template_is_an_error(ledger_model):
    _, tokenizer = ledger_model
    with pytest.raises(
        ConfigError, match=r"--data\.chat_template=false, or of python -m expo\.data --no-chat-template"
    ):
        render_prompts([Question("1", "1+1=", "2")], DataSection(train="x", chat_template=True), tokenizer)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "lost"])
def test_a_missing_model_folder_is_an_error_before_loading(path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(ModelSection(path=path), None)
