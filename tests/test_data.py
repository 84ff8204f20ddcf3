"""Questions: files, duplicates, prompts, and errors that name the line."""

import json

import pytest

from expo.config import ConfigError, DataSection
from expo.data import PROMPTS, Question, load_questions, question_id, render_prompt, render_prompts
from expo.model import load_model


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


def test_ids_depend_on_the_text_alone():
    assert question_id("What  is\n1+1? ") == question_id("What is 1+1?")
    assert question_id("1+1") != question_id("1+2")


def test_given_ids_and_levels_are_kept(tmp_path):
    loaded = load_questions(write(tmp_path / "q.jsonl", {"question": "a", "answer": "b", "id": 7, "level": "hard"}))
    assert loaded.questions == (Question("7", "a", "b", "hard"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no questions"),
        ('{"question": "a", "answer": "b"}\n{"question": ', "q.jsonl:2 is not JSON"),
        ('{"quest": "a", "answer": "b"}', "q.jsonl:1 has no `question`"),
        ('{"question": "a"}', "q.jsonl:1 has no `answer`"),
        ('{"question": "a", "answer": true}', "q.jsonl:1 has no `answer`"),
        ('{"question": "a", "answer": "1"}\n{"question": "a", "answer": "2"}', "comes twice"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, expected):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"q\.jsonl") as error:
        load_questions(str(path))
    assert expected in str(error.value)


def test_a_missing_file_names_the_built_in_sets():
    with pytest.raises(ConfigError, match="ledger:train"):
        load_questions("ledger:trian")


def test_built_in_sets_share_no_question():
    sets = [{q.id for q in load_questions(f"ledger:{name}").questions} for name in ("train", "held_out", "beyond")]
    assert len(sets[0]) >= 1000
    assert sum(len(ids) for ids in sets) == len(set.union(*sets))


@pytest.mark.parametrize("name", PROMPTS)
def test_every_template_holds_the_question_and_survives_braces(name):
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
    assert [prompted.question.id for prompted in kept] == ["2"]
    with pytest.raises(ConfigError, match="the shortest has 3 tokens"):
        render_prompts([Question("1", "a b c", "1")], section, WordTokenizer())


def test_a_missing_chat_template_is_an_error(ledger_model):
    _, tokenizer = ledger_model
    with pytest.raises(ConfigError, match="chat_template=false"):
        render_prompts([Question("1", "1+1=", "2")], DataSection(train="x", chat_template=True), tokenizer)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "lost"])
def test_a_missing_model_folder_is_an_error_before_loading(path):
    from expo.config import ModelSection

    with pytest.raises(ConfigError, match="does not exist"):
        load_model(ModelSection(path=path), None)
