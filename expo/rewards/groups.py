"""Graded groups: the replies to each question with their verdicts and rewards, for training and for evaluation.

Source: dynamic sampling, DAPO (arXiv 2503.14476, section 3.2). A group whose rewards are all equal has zero advantages,
so training replaces it with the group of another question. The metrics of a step, accuracy and pass rates above all,
cover every group sampled, replaced ones included. Letters: Q questions, G replies to each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.types import Prompt, Reply, Verdict


class Grader(Protocol):
    """Grades replies: a `Verifier`, or a `DataParallelVerifier`."""

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply against its gold answer."""


@dataclass(frozen=True)
class GradedRollouts:
    """Q questions with G replies each: `verdicts[q][g]` is the verdict on `replies[q][g]`.

    shaped: [Q, G] float32, the rewards behind the advantages; None: those of the verdicts. reward_parts: [Q, G] float32
    each, the terms that shaping added, by name, before their weights.
    """

    prompts: Sequence[Prompt]
    replies: Sequence[Sequence[Reply]]
    verdicts: Sequence[Sequence[Verdict]]
    shaped: Tensor | None = None
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def correct(self) -> Tensor:
        """[Q, G] float32, 1 for a correct reply, else 0: the source of accuracy, KL coefficient and pass rates."""
        return torch.tensor([[verdict.reward for verdict in group] for group in self.verdicts])

    @property
    def rewards(self) -> Tensor:
        """[Q, G] float32, the rewards that advantages are computed from."""
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
        """Total reply tokens, end-of-sequence tokens included."""
        return int(self.lengths.sum())

    def fractions(self) -> dict[str, float]:
        """Shares of all replies; see the function `fractions`."""
        verdicts = [verdict for group in self.verdicts for verdict in group]
        return fractions(
            [verdict.kind for verdict in verdicts],
            [reply.is_truncated for group in self.replies for reply in group],
            [verdict.is_unevaluated for verdict in verdicts],
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row of completions.jsonl for each reply, question after question."""
        return [
            {
                "question_id": prompt.question.id,
                "level": prompt.question.level,
                "question": prompt.question.text,
                "answer": prompt.question.answer,
                "reply": reply.text,
                "stated": verdict.answer,
                "verdict": verdict.kind,
                "unevaluated": verdict.is_unevaluated,
                "reward": verdict.reward,
                "shaped_reward": reward,
                "num_tokens": len(reply.token_ids),
                "truncated": reply.is_truncated,
            }
            for prompt, *columns in zip(self.prompts, self.replies, self.verdicts, self.rewards.tolist(), strict=True)
            for reply, verdict, reward in zip(*columns, strict=True)
        ]


@dataclass(frozen=True)
class Rollouts:
    """The groups of one training step, sampled in rounds, in the order in which their questions were drawn.

    size: number of groups to train on.
    """

    rounds: Sequence[GradedRollouts]
    size: int

    @cached_property
    def sampled(self) -> GradedRollouts:
        """Every group sampled."""
        return concatenated(self.rounds)

    @cached_property
    def kept_groups(self) -> GradedRollouts:
        """The groups to train on: the first `size` with unequal rewards; if there are fewer, the first others too."""
        first = has_unequal_rewards(self.sampled.rewards).int().argsort(descending=True, stable=True)[: self.size]
        return self.sampled.select(first.sort().values.tolist())

    @property
    def num_missing(self) -> int:
        """Number of groups to sample in a further round."""
        return max(self.size - int(has_unequal_rewards(self.sampled.rewards).sum()), 0)

    def metrics(self) -> dict[str, int]:
        """Entries of metrics.jsonl; `STEP_METRICS` describes them."""
        num_sampled = len(self.sampled.prompts)
        return {
            "groups_sampled": num_sampled,
            "groups_dropped": num_sampled - self.size,
            "resampling_rounds": len(self.rounds) - 1,
        }


def has_unequal_rewards(rewards: Tensor) -> Tensor:
    """Whether the rewards [Q, G] of each group differ, so that its advantages are not all zero: [Q] bool."""
    # compared directly: the floating-point std of equal rewards need not be 0
    return rewards.amax(dim=1) != rewards.amin(dim=1)


def grade(verifier: Grader, prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]]) -> GradedRollouts:
    """Verdicts on all replies, in one call of the verifier."""
    texts = [reply.text for group in replies for reply in group]
    answers = [prompt.question.answer for prompt, group in zip(prompts, replies, strict=True) for _ in group]
    verdicts = iter(verifier.grade(texts, answers))
    return GradedRollouts(prompts, replies, [[next(verdicts) for _ in group] for group in replies])


def fractions(kinds: Sequence[str], is_truncated: Sequence[bool], is_unevaluated: Sequence[bool]) -> dict[str, float]:
    """Shares of replies that state no answer, timed out in grading, state an unevaluated value, and were truncated."""
    return {
        "unparsed_fraction": kinds.count("unparsed") / len(kinds),
        "timeout_fraction": kinds.count("timeout") / len(kinds),
        "unevaluated_fraction": is_unevaluated.count(True) / len(is_unevaluated),
        "truncated_fraction": is_truncated.count(True) / len(is_truncated),
    }


def concatenated(parts: Sequence[GradedRollouts]) -> GradedRollouts:
    """The groups of all parts in order; either all parts have shaped rewards or none has."""
    shaped = [part.shaped for part in parts if part.shaped is not None]
    return GradedRollouts(
        [prompt for part in parts for prompt in part.prompts],
        [group for part in parts for group in part.replies],
        [group for part in parts for group in part.verdicts],
        torch.cat(shaped) if shaped else None,
        {name: torch.cat([part.reward_parts[name] for part in parts]) for name in parts[0].reward_parts},
    )
