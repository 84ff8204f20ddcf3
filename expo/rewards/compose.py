"""The reward behind the advantages: verdict, reward functions and overlong penalty, weighted and added.

It shapes the advantages alone: accuracy, with it the KL coefficient, and the pass rates of the curriculum stay the
verifier's.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expo.config import RewardSection
from expo.errors import ConfigError, RewardError
from expo.rewards.graded import GradedRollouts
from expo.runtime.distributed import Ranks

RewardFunction = Callable[[list[str], list[str], list[str]], Sequence[float]]
"""Called as function(replies, answers, questions) with the texts of one rollout, B each, replies to one question side
by side; gives one finite number for each reply, in order. It runs on rank 0, and is to finish within
`deadline.reward`."""

SHOWN_CHARS = 300  # of a reply, in messages


def load_reward_functions(names: Iterable[str]) -> dict[str, RewardFunction]:
    """The functions that "package.module:function" name, by that name.

    Raises: ConfigError if a module cannot be imported or has no such function.
    """
    return {name: _load(name) for name in names}


def _load(name: str) -> RewardFunction:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # another's module may raise anything while it is imported
        raise ConfigError(
            f"reward.functions: {name} cannot be loaded ({_said(error)}); the module must be "
            f"installed or lie in the folder where the run is started"
        ) from error
    if not callable(found):
        raise ConfigError(f"reward.functions: {name} is a {type(found).__name__}; name a function")
    function: RewardFunction = found
    return function


class RewardComposer:
    """Adds up what `config.reward` rewards.

    Args:
        section: the weights.
        max_new_tokens: the longest reply.
        functions: what `load_reward_functions` found.
        ranks: the processes of the run; rank 0 calls the functions, so that all learn from the same numbers.
    """

    def __init__(
        self, section: RewardSection, max_new_tokens: int, functions: Mapping[str, RewardFunction], ranks: Ranks
    ) -> None:
        self._section, self._max_new_tokens = section, max_new_tokens
        self._functions, self._ranks = functions, ranks

    def shape(self, graded: GradedRollouts) -> GradedRollouts:
        """The same replies with their shaped rewards and the parts of them.

        Raises: RewardError, on every rank.
        """
        section, parts = self._section, {}
        rewards = section.correct_weight * graded.correct
        if self._functions:
            for name, values in self._called(graded).items():
                part = values.view_as(rewards)
                parts[name.partition(":")[2]] = part
                rewards = rewards + section.functions[name] * part
        if section.overlong_buffer:
            parts["overlong"] = overlong_penalties(graded.lengths, self._max_new_tokens, section.overlong_buffer)
            rewards = rewards + section.overlong_penalty * parts["overlong"]
        return replace(graded, shaped=rewards, reward_parts=parts)

    def _called(self, graded: GradedRollouts) -> dict[str, Tensor]:
        """What each function says of every reply, or the same RewardError on all ranks."""
        rows = [
            (reply.text, prompt.question.answer, prompt.question.text)
            for prompt, group in zip(graded.prompts, graded.replies, strict=True)
            for reply in group
        ]

        values: list[Tensor] = []

        def call() -> str | None:
            try:
                values.extend(torch.tensor(_values(*each, rows)) for each in self._functions.items())
            except RewardError as error:
                return str(error)
            return None

        problem = self._ranks.run_on_rank0(call)
        if problem is not None:
            raise RewardError(problem)
        return dict(zip(self._functions, self._ranks.broadcast_tensors_from_rank0(values), strict=True))


_Row = tuple[str, str, str]  # reply, answer, question


def _values(name: str, function: RewardFunction, rows: Sequence[_Row]) -> list[float]:
    """One finite number for each row. Raises: RewardError with the function's name and the reply."""
    try:
        given = _call(function, rows)
    except Exception as error:  # another's function may raise anything
        raise RewardError(f"reward function {name} raised {_said(error)}, {_culprit(function, rows)}") from error
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward function {name} returned {_cut(given)}; return a list of numbers, one for each reply"
        ) from error
    if len(values) != len(rows):
        raise RewardError(
            f"reward function {name} returned {len(values)} numbers for {len(rows)} replies; return one for each"
        )
    for value, (reply, _, question) in zip(values, rows, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"reward function {name} returned {value} for the reply {_cut(reply)} to {_cut(question)}; return "
                f"finite numbers"
            )
    return values


def _call(function: RewardFunction, rows: Sequence[_Row]) -> Sequence[float]:
    replies, answers, questions = zip(*rows, strict=True)
    return function(list(replies), list(answers), list(questions))


def _culprit(function: RewardFunction, rows: Sequence[_Row]) -> str:
    """The first reply on which the function raises when it is given no other."""
    for reply, answer, question in rows:
        try:
            _call(function, [(reply, answer, question)])
        except Exception:
            return f"given the reply {_cut(reply)} to {_cut(question)}"
    return f"given {len(rows)} replies at once, though not given any of them alone"


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def overlong_penalties(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0], like `lengths`, float32.

    Args:
        lengths: int64, tokens of replies, end-of-sequence token included.
        max_new_tokens: L_max, the longest reply.
        buffer: L_cache > 0, tokens before that over which the penalty grows from 0 to -1.
    """
    return ((max_new_tokens - buffer - lengths) / buffer).clamp(-1, 0)
