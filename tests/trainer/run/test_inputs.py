"""The inputs of a run: too few questions for a step, and prompts that ask for no answer."""

import copy
import json
import shlex

import pytest
import yaml

from expo.config import load_config
from expo.data import prompt_warnings
from expo.errors import ConfigError
from expo.run.inputs import load_inputs, require_enough_questions
from expo.types import Prompt, Question
from tests.docs.test_readme import blocks

(README_YAML,) = blocks("yaml")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 60, 61, 255])
@pytest.mark.parametrize(("group_size", "updates"), [(8, 16), (8, 1), (6, 4), (5, 16)])
@pytest.mark.parametrize("max_resamples", [0, 2])
def test_the_flags_for_a_small_file_are_those_with_which_it_starts(count, group_size, updates, max_resamples):
    given = [
        ("rollout.questions_per_step", 256), ("rollout.group_size", group_size),
        ("policy.updates_per_step", updates), ("rollout.max_resamples", max_resamples),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=f"has {count} usable questions, .*; add --") as error:
        require_enough_questions(load_config(None, given), count)
    flags = shlex.split(str(error.value).rpartition("; add ")[2])
    changes = [(name.removeprefix("--"), int(value)) for name, value in (flag.split("=") for flag in flags)]
    config = load_config(None, [*given, *changes])
    require_enough_questions(config, count)
    assert config.rollout.questions_per_step >= (count - (max_resamples > 0)) // 16 * 16


def test_resampling_needs_a_further_question():
    given = [("rollout.questions_per_step", 4), ("rollout.group_size", 4), ("rollout.max_resamples", 1)]
    config = load_config(None, given)
    with pytest.raises(ConfigError, match=r"finds no further questions: .*; add .*, or --rollout\.max_resamples=0$"):
        require_enough_questions(config, 4)
    require_enough_questions(config, 5)


def test_the_yaml_of_the_readme_starts_with_60_questions_and_the_flag_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{number}+1=", "answer": str(number + 1)} for number in range(60)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(README_YAML)
    # the embedded model, which has a short context and no chat template, in place of the README's
    here = [
        ("model.path", "ledger"), ("data.chat_template", False), ("data.prompt", "plain"),
        ("data.max_prompt_tokens", 32), ("rollout.max_new_tokens", 32),
    ]  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_inputs(load_config(tmp_path / "config.yaml", here))
    flag = str(error.value).rpartition("; add ")[2]
    assert flag == "--rollout.questions_per_step=60"
    started = load_inputs(load_config(tmp_path / "config.yaml", [*here, ("rollout.questions_per_step", 60)]))
    assert len(started.train_set) == 60
    assert yaml.safe_load(README_YAML)["data"]["train"] == "questions.jsonl"


class Letters:
    """A tokenizer that shows every character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "verifier", "chat_template", "warns"),
    [
        ("1+1=", "math", True, True), ("1+1=", "choice", True, True), ("1+1=", "mine:check", True, False),
        ("1+1=", "math", False, False), (r"1+1= \boxed{}", "math", True, False),
        ("end with ANSWER: x", "exact", True, False),
        ("within <answer>", "math", True, False),
    ],
)  # fmt: skip
def test_chat_prompts_that_ask_for_no_answer_are_a_warning(text, verifier, chat_template, warns):
    config = load_config(None, [("data.chat_template", chat_template)]).data
    prompts = [Prompt(Question("1", text, "2"), list(map(ord, text)))]
    lines = prompt_warnings({"data.train": prompts}, config, verifier, Letters())
    assert [line.startswith("warning: no prompt of data.train asks for an answer") for line in lines] == [True] * warns


def test_a_run_warns_of_a_plain_prompt_of_a_chat_model(tmp_path, monkeypatch, ledger_model):
    tokenizer = copy.deepcopy(ledger_model[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr("expo.run.inputs.load_tokenizer", lambda section: tokenizer)
    given = [("data.chat_template", True), ("evaluation.sets", {})]
    (warning,) = load_inputs(load_config(None, given)).warnings
    assert "set data.prompt to boxed or answer or think-answer" in warning
    assert load_inputs(load_config(None, [*given, ("data.chat_template", False)])).warnings == ()
