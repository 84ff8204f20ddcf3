"""The answer that a reply states."""

import pytest

from expo.rewards.answers import extract_answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1} is too small, so \boxed{2}", "2"),
        ("Answer: 7 cm", "7 cm"),
        (r"\boxed{5", None),
        ("no answer", None),
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
        ("answer" + " " * 50, None),
        ("\n", None),
        ("so ", None),
        ("and ", None),
    ],
)
def test_a_reply_of_a_million_characters_is_read(piece: str, answer: str | None) -> None:
    assert extract_answer(piece * (1_000_000 // len(piece))) == answer
