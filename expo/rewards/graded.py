"""Replies with their verdicts: what a rollout gives to training and to evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.types import Prompt, Reply, Verdict


class Grader(Protocol):
    """What gives verdicts: a verifier, or one on every rank."""

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply against its answer."""


@dataclass(frozen=True)
class GradedRollouts:
    """Q questions with G replies each: `replies[q][g]` was graded `verdicts[q][g]`.

    shaped: [Q, G] float32, rewards where they are more than the verdict's; reward_parts: [Q, G] float32 each, what
    they are made of beside the verdict, by name, before their weights.
    """

    prompts: Sequence[Prompt]
    replies: Sequence[Sequence[Reply]]
    verdicts: Sequence[Sequence[Verdict]]
    shaped: Tensor | None = None
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def correct(self) -> Tensor:
        """[Q, G] float32, 1 where correct, else 0: what accuracy, the KL coefficient and pass rates are made of."""
        return torch.tensor([[verdict.reward for verdict in group] for group in self.verdicts])

    @property
    def rewards(self) -> Tensor:
        """[Q, G] float32, what advantages are made of."""
        return self.correct if self.shaped is None else self.shaped

    @property
    def lengths(self) -> Tensor:
        """[Q, G] int64, tokens of each reply, its end-of-sequence token included."""
        return torch.tensor([[len(reply.token_ids) for reply in group] for group in self.replies])

    def select(self, questions: Sequence[int]) -> "GradedRollouts":
        """The groups of some questions, by their index in `prompts`."""
        return GradedRollouts(
            [self.prompts[q] for q in questions],
            [self.replies[q] for q in questions],
            [self.verdicts[q] for q in questions],
            None if self.shaped is None else self.shaped[questions],
            {name: values[questions] for name, values in self.reward_parts.items()},
        )

    @property
    def num_tokens(self) -> int:
        """Reply tokens in all, end-of-sequence tokens included."""
        return int(self.lengths.sum())

    def fractions(self) -> dict[str, float]:
        """Shares of all replies in which no answer was found, that could not be graded in time, that were cut."""
        kinds = [verdict.kind for group in self.verdicts for verdict in group]
        return fractions(kinds, [reply.is_truncated for group in self.replies for reply in group])

    def rows(self) -> list[dict[str, Any]]:
        """Every reply as it is written down, question after question."""
        return [
            {
                "question_id": prompt.question.id,
                "level": prompt.question.level,
                "question": prompt.question.text,
                "answer": prompt.question.answer,
                "reply": reply.text,
                "stated": verdict.answer,
                "verdict": verdict.kind,
                "reward": verdict.reward,
                "shaped_reward": reward,
                "num_tokens": len(reply.token_ids),
                "truncated": reply.is_truncated,
            }
            for prompt, *columns in zip(self.prompts, self.replies, self.verdicts, self.rewards.tolist(), strict=True)
            for reply, verdict, reward in zip(*columns, strict=True)
        ]


def fractions(kinds: Sequence[str], cut: Sequence[bool]) -> dict[str, float]:
    """Shares of replies in which no answer was found, that could not be graded in time, that were cut."""
    return {
        "unparsed_fraction": kinds.count("unparsed") / len(kinds),
        "timeout_fraction": kinds.count("timeout") / len(kinds),
        "truncated_fraction": cut.count(True) / len(cut),
    }


def grade(verifier: Grader, prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]]) -> GradedRollouts:
    """Verdicts for all replies, graded in one call."""
    texts = [reply.text for group in replies for reply in group]
    answers = [prompt.question.answer for prompt, group in zip(prompts, replies, strict=True) for _ in group]
    verdicts = iter(verifier.grade(texts, answers))
    return GradedRollouts(prompts, replies, [[next(verdicts) for _ in group] for group in replies])


def joined(parts: Sequence[GradedRollouts]) -> GradedRollouts:
    """The groups of all parts, one after the other; parts that were shaped, all in one way."""
    shaped = [part.shaped for part in parts if part.shaped is not None]
    return GradedRollouts(
        [prompt for part in parts for prompt in part.prompts],
        [group for part in parts for group in part.replies],
        [group for part in parts for group in part.verdicts],
        torch.cat(shaped) if shaped else None,
        {name: torch.cat([part.reward_parts[name] for part in parts]) for name in parts[0].reward_parts},
    )
