"""Ledger questions at the frontier of the warm-started model, which solves them seldom but not never.

The warm start slips where an operation crosses a ten, so a kind of question is a number of operations and of crossings.
The answer of a question is its whole chain of running totals, which `chain.has_right_chain` compares.

A training pool has three parts: frontier questions; hopeless ones, whose last totals are above the largest that the
model has ever written; and solved ones of one operation that does not cross a ten. Held-out questions are of the
frontier's kinds, and of one operation more.
"""

import random
from collections.abc import Callable, Mapping, Sequence

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
from expo.ledger.skewed import num_crossings
from expo.ledger.tokenizer import BOXED

Kind = tuple[int, int]
"""The number of operations, and how many of them cross a ten."""
FRONTIER_COUNTS: Mapping[Kind, int] = {(5, 3): 27, (5, 4): 27, (6, 4): 30, (6, 5): 30, (6, 6): 30}
HELD_OUT_COUNTS: Mapping[Kind, int] = dict.fromkeys(FRONTIER_COUNTS, 40)
# questions by the number of operations
HOPELESS_COUNTS = {5: 32, 6: 32}
HARDER_COUNTS = {7: 60}
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
    frontier = _of_kinds(rng, FRONTIER_COUNTS, is_wanted=is_training)
    hopeless = distinct_questions(rng, HOPELESS_COUNTS, _is_hopeless, HOPELESS_MAX_TOTAL)
    solved = distinct_questions(rng, {1: SOLVED_COUNT}, lambda text: is_training(text) and not num_crossings(text))
    return shuffled(rng, frontier + _with_chains(hopeless, "hopeless") + _with_chains(solved, "solved"))


def frontier_held_out() -> list[LedgerQuestion]:
    """The 200 held-out questions of the frontier's kinds, always the same."""
    return _of_kinds(random.Random(_HELD_OUT_SEED), HELD_OUT_COUNTS, is_wanted=is_held_out)


def frontier_harder() -> list[LedgerQuestion]:
    """The 60 held-out questions of 7 operations, always the same."""
    drawn = distinct_questions(random.Random(_HARDER_SEED), HARDER_COUNTS, is_held_out)
    return _with_chains(drawn, "7 operations")


def right_chain(question: str) -> str:
    """The reply with every running total right, such as "11,9,\\boxed{16}"."""
    *totals, last = running_totals(question)
    return "".join(f"{total}," for total in totals) + f"{BOXED}{last}}}"


def _of_kinds(
    rng: random.Random, counts: Mapping[Kind, int], *, is_wanted: Callable[[str], bool]
) -> list[LedgerQuestion]:
    chosen = []
    for (operations, crossings), count in counts.items():

        def is_of_kind(text: str, crossings: int = crossings) -> bool:
            return is_wanted(text) and num_crossings(text) == crossings

        drawn = distinct_questions(rng, {operations: count}, is_of_kind)
        chosen += _with_chains(drawn, f"{operations} operations, {crossings} crossings")
    return chosen


def _with_chains(questions: Sequence[LedgerQuestion], level: str) -> list[LedgerQuestion]:
    return [LedgerQuestion(text, right_chain(text), level) for text, _, _ in questions]


def _is_hopeless(question: str) -> bool:
    return running_totals(question)[-1] > MAX_TOTAL and is_training(question)
