"""Finds questions whose gold answers the verifier cannot grade against."""

from dataclasses import replace

from expo.data.questions import QuestionSet, name_some
from expo.errors import ConfigError
from expo.rewards.verifier import ungradable_answers
from expo.types import Question

MOST_SHOWN = 80  # characters of a gold answer in a message


def bad_questions(loaded: QuestionSet) -> list[Question]:
    r"""The questions with a gold answer that cannot be parsed, or does not verify when a reply boxes it."""
    bad = set(ungradable_answers([gold for question in loaded.questions for gold in question.golds]))
    return [question for question in loaded.questions if not bad.isdisjoint(question.golds)]


def only_gradable(loaded: QuestionSet, skip_bad_answers: bool) -> QuestionSet:
    """The set without the questions that cannot be graded.

    Raises: ConfigError, which names these questions, if there are any and not skip_bad_answers, or if no other is left.
    """
    bad = bad_questions(loaded)
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
