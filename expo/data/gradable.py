"""Finds questions whose gold answers the verifier cannot grade against."""

import sys
import time
from dataclasses import replace
from typing import Final

from expo.data.questions import QuestionSet, name_some
from expo.errors import ConfigError
from expo.rewards.families import is_entry
from expo.rewards.verifier import ungradable_answers
from expo.types import Question

MOST_SHOWN: Final = 80  # characters of a gold answer in a message
_SECONDS_BETWEEN_REPORTS: Final = 5.0


def bad_questions(loaded: QuestionSet, verifier: str | None = None) -> list[Question]:
    r"""The questions with a gold answer that cannot be parsed, or does not verify when a reply boxes it.

    verifier: what gives the verdicts, as `reward.verifier`; None for the one that the gold answers are made for. Slow
    checks report their progress on stderr.
    """
    if verifier is None:
        verifier = "reasoning-gym" if _has_entries(loaded) else "math"
    answers = [gold for question in loaded.questions for gold in question.golds]
    bad = set(ungradable_answers(answers, method=verifier, on_progress=_Progress(loaded.source)))
    return [question for question in loaded.questions if not bad.isdisjoint(question.golds)]


def _has_entries(loaded: QuestionSet) -> bool:
    return any(is_entry(question.answer) for question in loaded.questions[:1])


class _Progress:
    """Reports how many gold answers have been checked, every few seconds."""

    def __init__(self, source: str) -> None:
        self._source, self._last = source, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() - self._last > _SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            print(f"{self._source}: {done:,} of {total:,} gold answers checked", file=sys.stderr, flush=True)


def only_gradable(loaded: QuestionSet, skip_bad_answers: bool, verifier: str = "math") -> QuestionSet:
    """The set without the questions that cannot be graded.

    Raises: ConfigError, which names these questions, if there are any and not skip_bad_answers, or if no other is left.
    """
    if verifier == "math" and _has_entries(loaded):
        raise ConfigError(
            f"{loaded.source}: the answers of this family need its own scorer; set --reward.verifier=reasoning-gym"
        )
    bad = bad_questions(loaded, verifier)
    if not bad:
        return loaded
    named = name_some([f"{question.id} ({', '.join(map(repr, question.golds))[:MOST_SHOWN]})" for question in bad])
    if not skip_bad_answers:
        raise ConfigError(
            f"{loaded.source}: {len(bad)} gold answers cannot be parsed: {named}; correct these rows, or drop "
            f"them with --data.skip_bad_answers=true"
        )
    if len(bad) == len(loaded.questions):
        raise ConfigError(f"{loaded.source}: no gold answer can be parsed: {named}; give another file")
    left_out = {question.id for question in bad}
    return replace(
        loaded,
        questions=tuple(question for question in loaded.questions if question.id not in left_out),
        num_bad_answers=loaded.num_bad_answers + len(bad),
        notes=(*loaded.notes, f"{len(bad)} questions with gold answers that cannot be parsed are left out: {named}"),
    )
