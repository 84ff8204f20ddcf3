"""Warnings about replies without an answer: the first replies with the reason, and the setting to change."""

import pytest

from expo.config import load_config
from expo.rewards.groups import grade
from expo.rewards.verifier import Verifier
from expo.run.advice import first_unparsed, set_advice, step_advice
from expo.types import Prompt, Question, Reply


def graded(*texts, is_truncated=False):
    """Each text is the only reply to a question whose answer is 2."""
    prompts = [Prompt(Question(str(number), "1+1=", "2"), [1]) for number in range(len(texts))]
    return grade(Verifier(), prompts, [[Reply([1], [0.0], is_truncated, text)] for text in texts])


def advised(*texts, is_truncated=False, **settings):
    config = load_config(None, [(name.replace("__", "."), value) for name, value in settings.items()])
    replies = graded(*texts, is_truncated=is_truncated)
    row = {"step": 7, "accuracy": float(replies.correct.mean()), **replies.fractions()}
    advice = step_advice(row, replies, Verifier().why_unparsed, config)
    scores = {"pass_at": {"1": {"mean": row["accuracy"]}}, **replies.fractions()}
    of_set = set_advice("few", scores, first_unparsed(replies.rows), Verifier().why_unparsed, config)
    assert (of_set or "").replace("the evaluation set few", "step 7") == (advice or "")
    return advice


def test_replies_without_an_answer_are_shown_with_the_reason():
    first, *shown = advised("It is 2.", r"\boxed{2", "The answer is 2.", "unseen").splitlines()
    assert first.startswith(
        "warning: no reply of step 7 states an answer that can be read; the verifier reads the last"
    )
    assert "data.prompt = plain does not ask for one: take boxed or dapo, or data.template" in first
    assert shown == [
        "  unparsed, since it has none of these: It is 2.",
        "  unparsed, since its box is empty, does not end or is too long: \\boxed{2",
        "  unparsed, since it names an answer, but not after Answer: at the start of a line: The answer is 2.",
    ]


def test_shown_replies_are_cut_and_cannot_control_the_terminal():
    _, shown = advised("\x1b[2J\u202e\n" + "x" * 100_000 + "\x9b\x00end").splitlines()
    assert len(shown) < 300
    assert shown.isprintable()
    assert "\\x1b[2J\\u202e\\n" in shown
    assert shown.endswith("\\x9b\\x00end")


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"data__prompt": "boxed"}, "then change data.prompt = boxed, data.system or data.chat_template"),
        ({"data__template": "{question}!"}, "then change data.template, data.system or data.chat_template"),
        ({"data__template": "plain"}, "data.template = plain does not ask for one"),
        ({"reward__verifier": "mine:check"}, "then change the prompt or mine:check"),
    ],
)
def test_the_change_names_the_setting_that_makes_the_prompt(settings, change):
    assert change in advised("2", **settings)


def test_many_replies_without_an_answer_and_none_correct_are_a_warning_too():
    advice = advised("2", "two", "Answer: 3", "zwei")
    assert "no reply of step 7 is correct, and 75 % of them state no answer that can be read" in advice
    assert advised("2", "Answer: 3", "Answer: 4") is None
    assert advised("2", "two", "Answer: 2") is None
    assert advised(r"\boxed{2}") is None


def test_a_cut_reply_is_the_cause_and_is_shown_all_the_same():
    first, shown = advised("<think> 1 and", is_truncated=True).splitlines()
    assert "every reply of step 7 was cut at rollout.max_new_tokens" in first
    assert "its thinking does not end with </think>: <think> 1 and" in shown
    assert advised(r"\boxed{2}", is_truncated=True).count("\n") == 0
