"""The ledger task: chains of single-digit additions and subtractions, drawn from a seed.

A question is the text "3+8-2+7=", which is exactly what the model is shown. The reply writes every running
total and boxes the last one: "11,9,\\boxed{16}". Level "steps-k" has k operations; totals stay in 0..29.

Levels 1 to 6 are trained on, 7 and 8 never are. A question is held out by its text alone (`is_held_out`), so
no training set of any seed, and nothing the warm start was fed, can contain a held-out question.
Only `random.Random.random` is used: Python promises its sequence for a seed, and no other method's.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MAX_TOTAL = 29  # two digits at most, and few enough totals that a small model learns every step
TRAIN_STEPS = (1, 2, 3, 4, 5, 6)
BEYOND_STEPS = (7, 8)
HELD_OUT_SHARE = 4  # one question in four; of the 135 questions of level 1 that leaves 28 held out, 107 not

# Questions of each number of steps. Level 1 is small because it has few distinct questions.
TRAIN_COUNTS = {1: 84, 2: 156, 3: 196, 4: 196, 5: 196, 6: 196}
HELD_OUT_COUNTS = {1: 25, 2: 43, 3: 43, 4: 43, 5: 43, 6: 43}
BEYOND_COUNTS = {7: 30, 8: 30}

# Seeds of the two fixed sets; training sets add their own seed to the third.
_HELD_OUT_SEED = 1_000_003
_BEYOND_SEED = 2_000_003
_TRAIN_SEED = 3_000_003


class LedgerQuestion(NamedTuple):
    """One question with its answer and the name of its level."""

    question: str
    answer: str
    level: str


def level_name(num_steps: int) -> str:
    """Name of the level with `num_steps` operations, such as "steps-3"."""
    return f"steps-{num_steps}"


def running_totals(question: str) -> list[int]:
    """Totals after each operation of a question text; the last one is the answer."""
    first, *steps = re.findall(r"[+-]?\d", question)
    totals = [int(first)]
    for step in steps:
        totals.append(totals[-1] + int(step))
    return totals[1:]


def is_held_out(question: str) -> bool:
    """Whether a question text is reserved for the held-out set, decided by a hash of the text."""
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_question(rng: random.Random, num_steps: int, max_total: int = MAX_TOTAL) -> LedgerQuestion:
    """One random question of `num_steps` operations and totals of 0 to `max_total`, held out or not; advances `rng`."""
    total = int(rng.random() * 10)
    text = str(total)
    for _ in range(num_steps):
        moves = [move for move in range(-9, 10) if move != 0 and 0 <= total + move <= max_total]
        move = moves[int(rng.random() * len(moves))]
        total += move
        text += f"{move:+d}"
    return LedgerQuestion(text + "=", str(total), level_name(num_steps))


def draw_training_question(rng: random.Random, num_steps: int) -> LedgerQuestion:
    """One random question that is not held out; advances `rng`."""
    while True:
        drawn = draw_question(rng, num_steps)
        if not is_held_out(drawn.question):
            return drawn


def train_questions(seed: int) -> list[LedgerQuestion]:
    """1,024 distinct training questions of levels 1 to 6 in a random order; none is held out.

    Args:
        seed: any integer >= 0; each gives its own questions and its own order.
    """
    rng = training_generator(_TRAIN_SEED, seed)
    return shuffled(rng, distinct_questions(rng, TRAIN_COUNTS, is_training))


def held_out_questions() -> list[LedgerQuestion]:
    """The 240 held-out questions of levels 1 to 6, always the same, easiest level first."""
    return distinct_questions(random.Random(_HELD_OUT_SEED), HELD_OUT_COUNTS, is_held_out)


def beyond_questions() -> list[LedgerQuestion]:
    """The 60 questions of levels 7 and 8, longer than anything trained on, always the same."""
    return distinct_questions(random.Random(_BEYOND_SEED), BEYOND_COUNTS, is_held_out)


def training_generator(base: int, seed: int) -> random.Random:
    """The generator of training set `seed` of the pool whose seeds start at `base`.

    Raises: ValueError if `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected an integer >= 0")
    return random.Random(base + seed)


def is_training(question: str) -> bool:
    """Whether a question text may be trained on: it is not held out."""
    return not is_held_out(question)


def distinct_questions(
    rng: random.Random, counts: Mapping[int, int], is_wanted: Callable[[str], bool], max_total: int = MAX_TOTAL
) -> list[LedgerQuestion]:
    """Distinct random questions, `counts[k]` with k operations, whose texts are all wanted; advances `rng`."""
    chosen: dict[str, LedgerQuestion] = {}
    for num_steps, count in counts.items():
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            drawn = draw_question(rng, num_steps, max_total)
            if is_wanted(drawn.question):
                chosen[drawn.question] = drawn
    return list(chosen.values())


def shuffled(rng: random.Random, questions: Sequence[LedgerQuestion]) -> list[LedgerQuestion]:
    """The questions in a random order; advances `rng`."""
    return sorted(questions, key=lambda _: rng.random())
