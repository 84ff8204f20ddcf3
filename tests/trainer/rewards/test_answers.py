"""The answer that a reply states."""

import pytest

from expo.rewards.answers import extract_answer
from expo.rewards.extract import why_unparsed
from expo.rewards.methods import Reading
from expo.rewards.verifier import Verifier


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1} is too small, so \boxed{2}", "2"),
        ("Answer: 7 cm", "7 cm"),
        (r"\boxed{5", None),
        ("no answer", None),
        ("<think>2</think> <answer> 3 cm </answer>", "3 cm"),
        ("<answer>Answer: 5</answer>", "5"),
        ("<answer>\nIn all\n**Answer:** 5\n</answer>", "5"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        (r"\boxed{4} <answer>5</answer>", "5"),
        (r"<answer>5</answer> \boxed{6}", "6"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        ("<answer>6</answer>\nAnswer: 7", "7"),
        ("Answer: 7\n<answer>6</answer>", "6"),
        ("<answer>4</answer> <answer>5</answer>", "5"),
        ("<answer><answer>5</answer>", "5"),
        ("<answer>5", None),
        ("5</answer>", None),
        ("<answer> </answer>", None),
        ("<think><answer>5</answer></think>", None),
        ("<answer>" + "5" * 2001 + "</answer>", None),
    ],
)
def test_an_answer_is_extracted_as_stated(reply: str, answer: str | None) -> None:
    assert extract_answer(reply) == answer


@pytest.mark.parametrize(
    ("piece", "answer"),
    [
        (r"\boxed{", None),
        ("{", None),
        ("\\", None),
        ("answer ", None),
        (r"\boxed{1},", "1"),
        ("<answer>", None),
        ("</answer>", None),
        ("<answer></answer>", None),
        ("<answer>1</answer>", "1"),
        ("answer" + " " * 50, None),
        ("\n", None),
        ("so ", None),
        ("and ", None),
    ],
)
def test_a_reply_of_a_million_characters_is_read(piece: str, answer: str | None) -> None:
    assert extract_answer(piece * (1_000_000 // len(piece))) == answer


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("<think> 1 + 1", "its thinking does not end with </think>"),
        ("<think> 2 </think>\n", "nothing follows its thinking"),
        (r"So \boxed{2", "its box is empty, does not end or is too long"),
        (r"So \boxed{}", "its box is empty, does not end or is too long"),
        (r"\boxed{" + "5" * 2001 + "}", "its box is empty, does not end or is too long"),
        ("<answer> 2", "its <answer> is empty, does not end or is too long"),
        ("Answer:", "it says Answer: within a line or with nothing after it"),
        ("I say that the only Answer: 2", "it says Answer: within a line or with nothing after it"),
        ("The answer is 2.", "it names an answer, but not after Answer: at the start of a line"),
        ("2", "it has none of these"),
        ("Zwei 二", "it has none of these"),
        (r"\boxed{2}", None),
        ("<answer>2</answer>", None),
    ],
)
def test_a_reply_without_an_answer_says_why(reply: str, reason: str | None) -> None:
    assert why_unparsed(reply) == reason
    assert (extract_answer(reply) is None) == (reason is not None)
    if reason is not None:
        assert Verifier().why_unparsed(reply) == reason


def test_the_reason_depends_on_how_replies_are_read() -> None:
    reading = Reading(think_tags=(("[T]", "[/T]"),), is_thinking=True)
    assert Verifier(reading=reading).why_unparsed("2") == "its thinking does not end with [/T]"
    assert Verifier(method="mine:check", reading=reading).why_unparsed("2") == "its thinking does not end with [/T]"
    assert Verifier(method="mine:check").why_unparsed("2") == "mine:check says so"
    assert why_unparsed("2" * 10_000_000) == "it has none of these"
