"""A skewed set of ledger questions: half of them are trivial or hopeless for the warm-started model.

Trivial questions have one operation that does not cross a multiple of ten. Hopeless ones have 9 or 10 operations, more
than in the model's training data; it solves 3 in 100. A curriculum helps most here, because uniform sampling spends
half of its questions on groups without a gradient.
"""

from itertools import pairwise

from expo.ledger.questions import (
    LedgerQuestion,
    distinct_questions,
    is_training,
    running_totals,
    shuffled,
    training_generator,
)

TRIVIAL_COUNT = 64  # of the 70 that there are
USEFUL_COUNTS = {3: 43, 4: 43, 5: 42}
HOPELESS_COUNTS = {9: 32, 10: 32}
_SEED = 4_000_003


def skewed_questions(seed: int) -> list[LedgerQuestion]:
    """256 distinct training questions in a random order; none is held out.

    Args:
        seed: any integer >= 0; each gives its own questions and its own order.
    """
    rng = training_generator(_SEED, seed)
    trivial = distinct_questions(rng, {1: TRIVIAL_COUNT}, lambda text: is_training(text) and not num_crossings(text))
    return shuffled(rng, trivial + distinct_questions(rng, USEFUL_COUNTS | HOPELESS_COUNTS, is_training))


def num_crossings(question: str) -> int:
    """How many operations of a question text change the tens digit of the total."""
    totals = [int(question[0]), *running_totals(question)]
    return sum(before // 10 != after // 10 for before, after in pairwise(totals))
