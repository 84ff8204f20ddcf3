"""Ledger questions at the frontier of the warm-started model, which solves them seldom but not never.

A training pool has three parts: frontier questions of levels 7 and 8, which no warm start was taught; hopeless ones of
the same levels, whose answers are above the largest total that the model has ever written; and solved ones of one
operation that does not cross a ten. Held-out questions are of the frontier's levels, and of one level harder.
"""

import random

from expo.ledger.questions import (
    MAX_TOTAL,
    LedgerQuestion,
    draw_question,
    draw_training_question,
    is_held_out,
    level_name,
    running_totals,
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
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected an integer >= 0")
    rng = random.Random(_TRAIN_SEED + seed)
    chosen: dict[str, LedgerQuestion] = {}
    for num_steps, count in FRONTIER_COUNTS.items():
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            drawn = draw_training_question(rng, num_steps)
            chosen[drawn.question] = drawn
    for num_steps, count in HOPELESS_COUNTS.items():
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            drawn = draw_hopeless_question(rng, num_steps)
            if not is_held_out(drawn.question):
                chosen[drawn.question] = drawn
    wanted = len(chosen) + SOLVED_COUNT
    while len(chosen) < wanted:
        drawn = draw_training_question(rng, 1)
        if not crosses_a_ten(drawn.question):
            chosen[drawn.question] = drawn
    return sorted(chosen.values(), key=lambda _: rng.random())


def part_of(question: LedgerQuestion) -> str:
    """The part of a training pool that a question belongs to: frontier, hopeless or solved."""
    if len(running_totals(question.question)) == 1:
        return "solved"
    return "hopeless" if int(question.answer) > MAX_TOTAL else "frontier"


def frontier_held_out() -> list[LedgerQuestion]:
    """The 200 held-out questions of levels 7 and 8, always the same."""
    return _held_out(_HELD_OUT_SEED, HELD_OUT_COUNTS)


def frontier_harder() -> list[LedgerQuestion]:
    """The 60 held-out questions of level 9, always the same."""
    return _held_out(_HARDER_SEED, HARDER_COUNTS)


def _held_out(seed: int, counts: dict[int, int]) -> list[LedgerQuestion]:
    rng = random.Random(seed)
    chosen: dict[str, LedgerQuestion] = {}
    for num_steps, count in counts.items():
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            drawn = draw_question(rng, num_steps)
            if is_held_out(drawn.question):
                chosen[drawn.question] = drawn
    return list(chosen.values())


def draw_hopeless_question(rng: random.Random, num_steps: int) -> LedgerQuestion:
    """One random question whose answer is above `MAX_TOTAL`; advances `rng`."""
    while True:
        total = int(rng.random() * 10)
        text = str(total)
        for _ in range(num_steps):
            moves = [move for move in range(-9, 10) if move != 0 and 0 <= total + move <= HOPELESS_MAX_TOTAL]
            move = moves[int(rng.random() * len(moves))]
            total += move
            text += f"{move:+d}"
        if total > MAX_TOTAL:
            return LedgerQuestion(text + "=", str(total), level_name(num_steps))
