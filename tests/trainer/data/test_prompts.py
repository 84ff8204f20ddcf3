"""Prompts: system messages, templates of one's own, chat templates that fail, tokenizers that end the sequence."""

import copy

import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from expo.config import DataSection
from expo.data import load_questions, render_prompt
from expo.errors import ConfigError
from expo.types import Question
from tests.trainer.data.test_layouts import verl, write

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}{{ suffix | default('-') }}"
)


@pytest.fixture
def tokenizer(ledger_model):
    """Its vocabulary lacks letters, so `decode` cannot show them: tests compare the text that is encoded."""
    tokenizer = copy.deepcopy(ledger_model[1])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def prompt_text(tokenizer, monkeypatch):
    """The text of a prompt, before it is encoded."""

    def text(question, **settings):
        rendered = []
        render = type(tokenizer).apply_chat_template

        def record(messages, **options):
            rendered.append(render(tokenizer, messages, tokenize=False, **{**options, "return_dict": False}))
            return {"input_ids": [2]}

        monkeypatch.setattr(tokenizer, "apply_chat_template", record)
        render_prompt(question, DataSection(train="x", prompt="plain", **settings), tokenizer)
        return rendered[0]

    return text


def test_the_system_message_of_a_row_is_kept(tmp_path, prompt_text, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    (question,) = load_questions(write(tmp_path / "q.jsonl", verl(messages, "2"))).questions
    assert (question.text, question.system) == ("1+1=", "Be brief.")
    assert prompt_text(question) == "s:Be brief.;u:1+1=;-"
    assert prompt_text(question, system="Think.") == "s:Think.;u:1+1=;-"
    assert prompt_text(question, system="") == "u:1+1=;-"
    with pytest.raises(ConfigError, match=r"has a system message, which only a chat template can show"):
        render_prompt(question, DataSection(train="x", chat_template=False), tokenizer)
    assert render_prompt(question, DataSection(train="x", chat_template=False, system=""), tokenizer)


def test_the_questions_of_a_set_are_others_with_another_system_message(tmp_path):
    def digest(content):
        rows = [verl([{"role": "system", "content": content}, {"role": "user", "content": "1+1="}], "2")]
        return load_questions(write(tmp_path / "q.jsonl", *rows)).digest

    assert digest("a") != digest("b")


def test_the_digest_of_plain_questions_is_that_of_earlier_versions(tmp_path):
    loaded = load_questions(write(tmp_path / "q.jsonl", {"question": "1+1=", "answer": "2", "id": "x"}))
    assert loaded.digest == "c85c874c30197f75465bcbd3c1735f2cdbba628752ba8268327003b420e0f34c"


def test_the_chat_template_gets_its_arguments(prompt_text):
    question = Question("1", "1+1=", "2")
    assert prompt_text(question, chat_template_kwargs={"suffix": "<think>"}) == "u:1+1=;<think>"


def test_a_template_of_ones_own_replaces_the_named_one(prompt_text):
    question = Question("1", "1+{1}=", "2")
    assert prompt_text(question, template=r"Solve: {question} in \boxed{}.") == r"u:Solve: 1+{1}= in \boxed{}.;-"


@pytest.mark.parametrize("template", ["Solve it.", "{question} {question}"])
def test_a_template_without_its_question_is_refused(template):
    with pytest.raises(ValidationError, match=r"must contain .*\{question\} once"):
        DataSection(train="x", template=template)


@pytest.mark.parametrize("setting", [{"system": "Be brief."}, {"chat_template_kwargs": {"a": 1}}])
def test_settings_of_a_chat_template_are_refused_without_one(setting):
    with pytest.raises(ValidationError, match="is for a chat template"):
        DataSection(train="x", chat_template=False, **setting)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{% for message in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ tools | length }}", "Error"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(tokenizer, template, problem):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"chat template fails on question 1: ") as error:
        render_prompt(Question("1", "1+1=", "2"), DataSection(train="x"), tokenizer)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_does_not_end_the_sequence(tokenizer):
    section = DataSection(train="x", prompt="plain", chat_template=False)
    plain = render_prompt(Question("1", "1+1=", "2"), section, tokenizer)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("1+1=")["input_ids"] == [*plain, tokenizer.eos_token_id]
    assert render_prompt(Question("1", "1+1=", "2"), section, tokenizer) == plain
