"""Ledger questions at the frontier of the warm-started model, which solves them seldom but not never.

A training pool has three parts: frontier questions of levels 7 and 8, which no warm start was taught; hopeless ones of
the same levels, whose answers are above the largest total that the model has ever written; and solved ones of one
operation that does not cross a ten. Held-out questions are of the frontier's levels, and of one level harder.
"""

import random

from expo.ledger.questions import (
    MAX_TOTAL,
    LedgerQuestion,
    distinct_questions,
    is_held_out,
    is_training,
    running_totals,
    shuffled,
    training_generator,
)
from expo.ledger.skewed import crosses_a_ten

# questions by the number of operations
FRONTIER_COUNTS = {7: 72, 8: 72}
HOPELESS_COUNTS = {7: 32, 8: 32}
HELD_OUT_COUNTS = {7: 100, 8: 100}
HARDER_COUNTS = {9: 60}
HOPELESS_MAX_TOTAL = 59
SOLVED_COUNT = 48  # of the 70 that there are
_TRAIN_SEED = 5_000_003
_HELD_OUT_SEED = 6_000_003
_HARDER_SEED = 7_000_003


def frontier_questions(seed: int) -> list[LedgerQuestion]:
    """256 distinct training questions in a random order; none is held out.

    Args:
        seed: any integer >= 0; each gives its own questions and its own order.
    """
    rng = training_generator(_TRAIN_SEED, seed)
    frontier = distinct_questions(rng, FRONTIER_COUNTS, is_training)
    hopeless = distinct_questions(rng, HOPELESS_COUNTS, _is_hopeless, HOPELESS_MAX_TOTAL)
    solved = distinct_questions(rng, {1: SOLVED_COUNT}, lambda text: is_training(text) and not crosses_a_ten(text))
    return shuffled(rng, frontier + hopeless + solved)


def _is_hopeless(question: str) -> bool:
    return running_totals(question)[-1] > MAX_TOTAL and is_training(question)


def part_of(question: LedgerQuestion) -> str:
    """The part of a training pool that a question belongs to: frontier, hopeless or solved."""
    if len(running_totals(question.question)) == 1:
        return "solved"
    return "hopeless" if int(question.answer) > MAX_TOTAL else "frontier"


def frontier_held_out() -> list[LedgerQuestion]:
    """The 200 held-out questions of levels 7 and 8, always the same."""
    return distinct_questions(random.Random(_HELD_OUT_SEED), HELD_OUT_COUNTS, is_held_out)


def frontier_harder() -> list[LedgerQuestion]:
    """The 60 held-out questions of level 9, always the same."""
    return distinct_questions(random.Random(_HARDER_SEED), HARDER_COUNTS, is_held_out)
