"""The record of a run's questions: on the console and in data.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expo.data.questions import QuestionSet
from expo.errors import ConfigError

TRAINING = "data.train"  # name of the training set in data.json
EVALUATION = "evaluation.sets."  # before the names of the other sets there


def left_out(loaded: QuestionSet, num_long: int) -> dict[str, int]:
    """Counts of questions and rows left out, by reason.

    Args:
        num_long: number of questions whose prompts exceed data.max_prompt_tokens.
    """
    return {
        "duplicate rows": loaded.num_duplicates,
        "with different answers": loaded.num_conflicts,
        "with answers that cannot be parsed": loaded.num_bad_answers,
        "that overlap with evaluation": loaded.num_overlapping,
        "with too long a prompt": num_long,
    }


def set_lines(loaded: QuestionSet, num_long: int = 0) -> list[str]:
    """The size of a set, what was left out of it, and its notes, as lines of text."""
    parts = [f"{count:,} {reason}" for reason, count in left_out(loaded, num_long).items() if count]
    reasons = f"; left out: {', '.join(parts)}" if parts else ""
    size = f"{loaded.source}: {len(loaded.questions) - num_long:,} questions{reasons}"
    unread = [f"the columns {', '.join(loaded.unread_columns)} are not used"] if loaded.unread_columns else []
    return [size, *(f"{loaded.source}: {note}" for note in [*loaded.notes, *unread])]


def set_record(loaded: QuestionSet, num_long: int) -> dict[str, Any]:
    """The record of a set for data.json, with the digest of its questions."""
    return {
        "source": loaded.source,
        "questions": len(loaded.questions) - num_long,
        "digest": loaded.digest,
        "left_out": left_out(loaded, num_long),
        "columns_not_used": list(loaded.unread_columns),
        "notes": list(loaded.notes),
    }


def require_same_questions(saved: Path, sets: Mapping[str, QuestionSet]) -> None:
    """Raises: ConfigError if `saved`, the data.json of a run, exists and is damaged or records other questions of the
    same source.
    """
    if not saved.exists():
        return
    try:
        before = {
            name: (entry["source"], entry["digest"]) for name, entry in json.loads(saved.read_bytes())["sets"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{saved} is damaged ({type(error).__name__}), so the questions cannot be compared with those that the run "
            f"started with; restore it, or delete it if you are sure that they are the same"
        ) from error
    differing = []
    for name, loaded in sets.items():
        source, digest = before.get(name, (None, None))
        # a resumed run may have other evaluation sets
        if (name == TRAINING or source == loaded.source) and digest != loaded.digest:
            differing.append(name)
    if differing:
        dropped = " (data.drop_overlap drops those of the evaluation sets)" if sets[TRAINING].num_overlapping else ""
        raise ConfigError(
            f"the questions of {', '.join(differing)} are not those that the run in {saved.parent} "
            f"started with{dropped}; restore them, or start another run"
        )
