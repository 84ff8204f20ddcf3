"""The scorers of reasoning-gym's families."""

import functools
from typing import Any


def score_entry(family: str, answer: str, entry: dict[str, Any]) -> float:
    """The family's own score of an answer to one of its entries, 0 to 1."""
    return float(_family(family).score_answer(answer, entry))


@functools.cache
def _family(name: str) -> Any:
    from reasoning_gym import factory

    return factory.create_dataset(name, size=1, seed=0)
