"""Reward functions for `reward.functions` that check the format of a reply: 1 if it is kept, else 0.

They have the signature of every reward function (see `expo.rewards.compose.RewardFunction`) and use the replies only.
"""

from expo.rewards.answers import has_box


def boxed(replies: list[str], answers: list[str], questions: list[str]) -> list[float]:  # noqa: ARG001
    r"""1 for each reply with a complete, non-empty `\boxed{...}`."""
    return [float(has_box(reply)) for reply in replies]


def think_then_answer(replies: list[str], answers: list[str], questions: list[str]) -> list[float]:  # noqa: ARG001
    """1 for each reply of the form `<think>...</think>`, then an answer, with each tag once.

    The opening tag may be missing, since chat templates put it into the prompt. Source: the format reward of
    DeepSeek-R1 (arXiv 2501.12948, section 2.2.2).
    """
    return [float(_thinks_then_answers(reply)) for reply in replies]


def _thinks_then_answers(reply: str) -> bool:
    thoughts, tag, answer = reply.partition("</think>")
    thoughts = thoughts.strip().removeprefix("<think>")
    tags = ("<think>", "</think>")
    return bool(tag and answer.strip()) and not any(tag in text for tag in tags for text in (thoughts, answer))
