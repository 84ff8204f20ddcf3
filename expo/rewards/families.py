"""Gold answers of reasoning-gym's families that need the family's own scorer: a whole entry, as JSON."""

import functools
import json
from typing import Any, Final

_START: Final = '{"reasoning_gym": '


def load_library() -> None:
    """Imports reasoning-gym, once, before workers are forked."""
    import reasoning_gym  # noqa: F401


def entry_gold(family: str, entry: dict[str, Any]) -> str:
    """The gold answer that states a family and its entry: question, answer and metadata."""
    return json.dumps({"reasoning_gym": family, "entry": entry}, default=str)


def is_entry(gold: str) -> bool:
    """Whether a gold answer is an entry."""
    return gold.startswith(_START)


def own_answer(gold: str) -> str | None:
    """The answer that an entry gives itself; None if it has none, being one of many."""
    answer = json.loads(gold)["entry"]["answer"]
    return None if answer is None else str(answer)


def score(answer: str, gold: str) -> float:
    """The family's own score of an answer to an entry, 0 to 1."""
    content = json.loads(gold)
    entry = content["entry"]
    # JSON has no tuples, and some scorers compare with them
    variants = (entry, {**entry, "metadata": _with_tuples(entry["metadata"])})
    return max(float(_family(content["reasoning_gym"]).score_answer(answer, variant)) for variant in variants)


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(member) for key, member in value.items()}
    return tuple(_with_tuples(member) for member in value) if isinstance(value, list) else value


@functools.cache
def _family(name: str) -> Any:
    from reasoning_gym import factory

    return factory.create_dataset(name, size=1, seed=0)
