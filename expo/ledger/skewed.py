"""A skewed set of ledger questions: half of them are trivial or hopeless for the warm-started model.

Trivial questions have one operation that does not cross a multiple of ten. Hopeless ones have 9 or 10 operations, more
than in the model's training data; it solves 3 in 100. A curriculum helps most here, because uniform sampling spends
half of its questions on groups without a gradient.
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
    """Whether an operation of a question text changes the tens digit of the total."""
    totals = [int(question[0]), *running_totals(question)]
    return any(before // 10 != after // 10 for before, after in pairwise(totals))
