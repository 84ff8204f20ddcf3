"""A skewed pool of ledger questions: half of them trivial or hopeless for the warm start, the other half in between.

Trivial: one operation that crosses no ten. Hopeless: 9 and 10 operations, more than the warm start was ever shown; it
solves 3 in 100. What a curriculum can gain, it can gain here: uniform sampling spends half of its questions on nothing.
"""

import random
from itertools import pairwise

from expo.ledger.questions import LedgerQuestion, draw_training_question, running_totals

TRIVIAL_COUNT = 64  # of the 70 that there are
USEFUL_COUNTS = {3: 43, 4: 43, 5: 42}
HOPELESS_COUNTS = {9: 32, 10: 32}
_SEED = 4_000_003


def skewed_questions(seed: int) -> list[LedgerQuestion]:
    """256 distinct training questions in a random order; none is held out.

    Args:
        seed: any integer >= 0; each gives its own questions and its own order.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected an integer >= 0")
    rng = random.Random(_SEED + seed)
    chosen: dict[str, LedgerQuestion] = {}
    for num_steps, count in [(1, TRIVIAL_COUNT), *USEFUL_COUNTS.items(), *HOPELESS_COUNTS.items()]:
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            drawn = draw_training_question(rng, num_steps)
            if num_steps > 1 or not crosses_a_ten(drawn.question):
                chosen[drawn.question] = drawn
    return sorted(chosen.values(), key=lambda _: rng.random())


def crosses_a_ten(question: str) -> bool:
    """Whether some operation of a question text leads from one ten into another."""
    totals = [int(question[0]), *running_totals(question)]
    return any(before // 10 != after // 10 for before, after in pairwise(totals))
