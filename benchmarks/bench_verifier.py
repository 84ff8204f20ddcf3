"""Replies graded per second: our verifier with its worker processes, and TRL's accuracy_reward in the calling process.

TRL's uses math-verify. Ours compares most answers by rational arithmetic in the calling process, the others by sympy in
workers, and can kill a worker that hangs on an answer.
"""

import importlib.util
import random
from collections.abc import Callable

import pytest

from benchmarks.machine import ROUNDS, RoundRobin, total_time
from expo.rewards.verifier import Verifier

COUNTS = {"numbers": 2000, "normal LaTeX": 200, "formulas": 40}  # replies per batch
MOST_ROUNDS = max(most for _, most in ROUNDS.values())
Batch = tuple[list[str], list[str], list[bool]]  # replies, answers, whether each reply is correct


def numbers(rng: random.Random, count: int) -> Batch:
    """Integers, like most benchmark answers; half of the replies are correct."""
    answers = [rng.randrange(1000) for _ in range(count)]
    is_correct = [rng.random() < 0.5 for _ in range(count)]
    values = [answer + (not correct) for answer, correct in zip(answers, is_correct, strict=True)]
    return [f"So the total is \\boxed{{{value}}}." for value in values], [str(answer) for answer in answers], is_correct


def normal_latex(rng: random.Random, count: int) -> Batch:
    """Typical answers in equal shares: fractions, roots, polynomials, an equation, multiples of pi, a length, a pair, a
    number; five of eight replies are correct.
    """
    pairs: list[tuple[str, str, bool]] = []
    while len(pairs) < count:
        a, b, c = rng.randint(2, 60), rng.randint(61, 999), rng.randint(2, 97)
        pairs += [
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}", True),
            (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}", True),
            (rf"{a}x+{b}", f"{b}+{a}x", True),
            (rf"x={a}", f"{a}", True),
            (rf"\dfrac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}\pi}}{{{b + 1}}}", False),
            (rf"{a}\text{{ cm}}", f"{a + 1}", False),
            (rf"({a}, {b})", rf"\left({a},{b}\right)", True),
            (f"{b}", f"{b + 1}", False),
        ]
    replies, answers, is_correct = zip(*pairs[:count], strict=True)
    return [rf"So it is \boxed{{{reply}}}." for reply in replies], list(answers), list(is_correct)


def formulas(rng: random.Random, count: int) -> Batch:
    """Expressions, all different, that need symbolic comparison; half of the replies are correct."""
    replies, answers, is_correct = [], [], []
    for _ in range(count):
        a, b, correct = rng.randrange(2, 10**6), rng.randrange(2, 10**6), rng.random() < 0.5
        answers.append(rf"\frac{{{a} + \sqrt{{{b}}}}}{{2}}")
        replies.append(rf"It is \boxed{{\frac{{\sqrt{{{b}}}}}{{2}} + \frac{{{a + (not correct)}}}{{2}}}}.")
        is_correct.append(correct)
    return replies, answers, is_correct


MAKE: dict[str, Callable[[random.Random, int], Batch]] = {
    "numbers": numbers,
    "normal LaTeX": normal_latex,
    "formulas": formulas,
}


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


def by_expo(verifier: Verifier) -> Callable[[Batch], list[bool]]:
    return lambda batch: [verdict.kind == "correct" for verdict in verifier.grade(batch[0], batch[1])]


def by_trl(_: Verifier) -> Callable[[Batch], list[bool]]:
    from trl.rewards import accuracy_reward

    def grade(batch: Batch) -> list[bool]:
        completions = [[{"role": "assistant", "content": reply}] for reply in batch[0]]
        return [value == 1.0 for value in accuracy_reward(completions, [f"${answer}$" for answer in batch[1]])]

    return grade


GRADERS = {"expo": by_expo, "TRL accuracy_reward": by_trl}


@pytest.mark.parametrize("kind", MAKE)
def test_verifier(kind, machine, table, rounds, verifier, is_tiny):
    names = [name for name in GRADERS if name == "expo" or importlib.util.find_spec("trl") is not None]
    rng, count = random.Random(0), 16 if is_tiny else COUNTS[kind]
    graders, first = {name: GRADERS[name](verifier) for name in names}, MAKE[kind](rng, count)
    for name, grade in graders.items():
        assert grade(first) == first[2], name

    # a new batch for each round, the same for all: our verifier caches verdicts
    batches = [MAKE[kind](rng, count) for _ in range(MOST_ROUNDS)]

    def once(name: str) -> Callable[[], None]:
        remaining = iter(batches)
        return lambda: graders[name](next(remaining))

    runs = {name: total_time(machine, once(name)) for name in names}
    for name, times in rounds(RoundRobin(machine, runs)).items():
        table.append({"case": kind, "replies": count, "contender": name, **times})
