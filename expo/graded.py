"""Replies with their verdicts: what a rollout gives to training and to evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.data import Prompted
from expo.rewards import Verdict
from expo.rollout import Reply


class Grader(Protocol):
    """What gives verdicts: a verifier, or one on every rank."""

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply against its answer."""


@dataclass(frozen=True)
class Graded:
    """Q questions with G replies each: `replies[q][g]` was graded `verdicts[q][g]`."""

    asked: Sequence[Prompted]
    replies: Sequence[Sequence[Reply]]
    verdicts: Sequence[Sequence[Verdict]]

    @cached_property
    def rewards(self) -> Tensor:
        """[Q, G] float32, 1 where correct, else 0."""
        return torch.tensor([[verdict.reward for verdict in group] for group in self.verdicts])

    @property
    def num_tokens(self) -> int:
        """Reply tokens in all, end-of-sequence tokens included."""
        return sum(len(reply.token_ids) for group in self.replies for reply in group)

    def fractions(self) -> dict[str, float]:
        """Shares of all replies in which no answer was found, that could not be graded in time, that were cut."""
        kinds = [verdict.kind for group in self.verdicts for verdict in group]
        return fractions(kinds, [reply.is_truncated for group in self.replies for reply in group])

    def rows(self) -> list[dict[str, Any]]:
        """Every reply as it is written down, question after question."""
        return [
            {
                "question_id": prompted.question.id,
                "level": prompted.question.level,
                "question": prompted.question.text,
                "answer": prompted.question.answer,
                "reply": reply.text,
                "stated": verdict.answer,
                "verdict": verdict.kind,
                "reward": verdict.reward,
                "num_tokens": len(reply.token_ids),
                "truncated": reply.is_truncated,
            }
            for prompted, group, judged in zip(self.asked, self.replies, self.verdicts, strict=True)
            for reply, verdict in zip(group, judged, strict=True)
        ]


def fractions(kinds: Sequence[str], cut: Sequence[bool]) -> dict[str, float]:
    """Shares of replies in which no answer was found, that could not be graded in time, that were cut."""
    return {
        "unparsed_fraction": kinds.count("unparsed") / len(kinds),
        "timeout_fraction": kinds.count("timeout") / len(kinds),
        "truncated_fraction": cut.count(True) / len(cut),
    }


def grade(verifier: Grader, asked: Sequence[Prompted], replies: Sequence[Sequence[Reply]]) -> Graded:
    """Verdicts for all replies, graded in one call."""
    texts = [reply.text for group in replies for reply in group]
    answers = [prompted.question.answer for prompted, group in zip(asked, replies, strict=True) for _ in group]
    verdicts = iter(verifier.grade(texts, answers))
    return Graded(asked, replies, [[next(verdicts) for _ in group] for group in replies])
