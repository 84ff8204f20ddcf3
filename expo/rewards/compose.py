"""The reward that advantages are computed from: the weighted sum of verdict, reward functions and overlong penalty.

It affects the advantages only: accuracy, the KL coefficient and the curriculum's pass rates depend on the verdicts
alone.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expo.config import RewardSection
from expo.errors import ConfigError, RewardError
from expo.rewards.groups import GradedRollouts
from expo.runtime.distributed import Ranks

RewardFunction = Callable[[list[str], list[str], list[str]], Sequence[float]]
"""Called as function(replies, answers, questions) with the texts of one rollout, B of each, replies to one question
adjacent; returns one finite number for each reply, in order. It runs on rank 0 and must finish within
`deadline.reward`."""

SHOWN_CHARS = 300  # of a reply in an error message


def load_reward_functions(names: Iterable[str]) -> dict[str, RewardFunction]:
    """Imports the functions named as "package.module:function"; returns them by that name.

    Raises: ConfigError if a module cannot be imported or has no such function.
    """
    return {name: load_function("reward.functions", name) for name in names}


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """Imports the function that a setting names as "package.module:function". Raises: ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except BaseException as error:  # importing a user's module may raise anything, and may call sys.exit
        raise ConfigError(
            f"{setting}: {name} cannot be imported ({_one_line(error)}); install its "
            f"module, or put it into the folder where the run is started"
        ) from error
    if not callable(found):
        raise ConfigError(f"{setting}: {name} is a {type(found).__name__}; give the name of a function")
    function: Callable[..., Any] = found
    return function


class RewardComposer:
    """Computes the reward that the config section `reward` defines.

    Args:
        section: the weights.
        max_new_tokens: length limit of a reply, in tokens.
        functions: from `load_reward_functions`.
        ranks: the processes of the run; only rank 0 calls the functions, so that all ranks have the same rewards.
    """

    def __init__(
        self, section: RewardSection, max_new_tokens: int, functions: Mapping[str, RewardFunction], ranks: Ranks
    ) -> None:
        self._section, self._max_new_tokens = section, max_new_tokens
        self._functions, self._ranks = functions, ranks

    def shape(self, graded: GradedRollouts) -> GradedRollouts:
        """The same rollouts with their shaped rewards and reward parts.

        Raises: RewardError, on every rank.
        """
        section, parts = self._section, {}
        rewards = section.correct_weight * graded.correct
        if self._functions:
            for name, values in self._call_functions(graded).items():
                part = values.view_as(rewards)
                parts[name.partition(":")[2]] = part
                rewards = rewards + section.functions[name] * part
        if section.overlong_buffer:
            parts["overlong"] = overlong_penalties(graded.lengths, self._max_new_tokens, section.overlong_buffer)
            rewards = rewards + section.overlong_penalty * parts["overlong"]
        return replace(graded, shaped=rewards, reward_parts=parts)

    def _call_functions(self, graded: GradedRollouts) -> dict[str, Tensor]:
        """The values of each function for every reply, by its name. Raises: RewardError, on every rank."""
        rows = [
            (reply.text, prompt.question.answer, prompt.question.text)
            for prompt, group in zip(graded.prompts, graded.replies, strict=True)
            for reply in group
        ]

        values: list[Tensor] = []

        def call() -> None:
            values.extend(torch.tensor(_values(name, function, rows)) for name, function in self._functions.items())

        self._ranks.run_on_rank0(call)
        return dict(zip(self._functions, self._ranks.broadcast_tensors_from_rank0(values), strict=True))


_Row = tuple[str, str, str]  # reply, answer, question


def _values(name: str, function: RewardFunction, rows: Sequence[_Row]) -> list[float]:
    """One finite number for each row. Raises: RewardError with the function's name and the reply."""
    try:
        returned = _call(function, rows)
    except BaseException as error:  # a user's function may raise anything, and may call sys.exit
        raise RewardError(
            f"reward function {name} raised {_one_line(error)}, {_failing_reply(function, rows)}"
        ) from error
    try:
        values = [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward function {name} returned {_shortened(returned)}; return a list of numbers, one for each reply"
        ) from error
    if len(values) != len(rows):
        raise RewardError(
            f"reward function {name} returned {len(values)} numbers for {len(rows)} replies; return one for each"
        )
    for value, (reply, _, question) in zip(values, rows, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"reward function {name} returned {value} for the reply {_shortened(reply)} to {_shortened(question)}; "
                f"return finite numbers"
            )
    return values


def _call(function: RewardFunction, rows: Sequence[_Row]) -> Sequence[float]:
    replies, answers, questions = zip(*rows, strict=True)
    return function(list(replies), list(answers), list(questions))


def _failing_reply(function: RewardFunction, rows: Sequence[_Row]) -> str:
    """Names the first reply for which the function raises when called with that reply alone."""
    for reply, answer, question in rows:
        try:
            _call(function, [(reply, answer, question)])
        except BaseException:  # as above
            return f"given the reply {_shortened(reply)} to {_shortened(question)}"
    return f"given {len(rows)} replies at once, though not given any of them alone"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def overlong_penalties(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): float32 in [-1, 0], of the shape of `lengths`.

    Args:
        lengths: int64, tokens of each reply, end-of-sequence token included.
        max_new_tokens: L_max, the length limit of a reply.
        buffer: L_cache > 0, the last tokens before the limit, over which the penalty goes from 0 to -1.
    """
    return ((max_new_tokens - buffer - lengths) / buffer).clamp(-1, 0)
