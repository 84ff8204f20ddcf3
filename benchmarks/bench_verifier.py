"""Replies graded per second: the verifier, in its worker processes, beside TRL's accuracy_reward in the caller's own.

Both use math-verify. Ours judges plain numbers without it, and its workers can be killed where an answer hangs.
"""

import importlib.util
import random
from collections.abc import Callable

import pytest

from benchmarks.machine import ROUNDS, RoundRobin, whole
from expo.rewards.verifier import Verifier

COUNTS = {"numbers": 2000, "normal LaTeX": 200, "formulas": 40}  # replies of a batch
MOST_ROUNDS = max(most for _, most in ROUNDS.values())
Batch = tuple[list[str], list[str], list[bool]]  # replies, answers, whether each is right


def numbers(rng: random.Random, count: int) -> Batch:
    """Integers, as the answers of most benchmarks are; half of the replies are right."""
    answers = [rng.randrange(1000) for _ in range(count)]
    is_right = [rng.random() < 0.5 for _ in range(count)]
    said = [answer + (not right) for answer, right in zip(answers, is_right, strict=True)]
    return [f"So the total is \\boxed{{{value}}}." for value in said], [str(answer) for answer in answers], is_right


def normal_latex(rng: random.Random, count: int) -> Batch:
    """What answers look like, in equal shares: fractions, roots, polynomials, an equation, multiples of pi, a length,
    a pair, a number; five of eight replies are right.
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
    replies, answers, is_right = zip(*pairs[:count], strict=True)
    return [rf"So it is \boxed{{{reply}}}." for reply in replies], list(answers), list(is_right)


def formulas(rng: random.Random, count: int) -> Batch:
    """Expressions that only algebra can compare, all different; half of the replies are right."""
    replies, answers, is_right = [], [], []
    for _ in range(count):
        a, b, right = rng.randrange(2, 10**6), rng.randrange(2, 10**6), rng.random() < 0.5
        answers.append(rf"\frac{{{a} + \sqrt{{{b}}}}}{{2}}")
        replies.append(rf"It is \boxed{{\frac{{\sqrt{{{b}}}}}{{2}} + \frac{{{a + (not right)}}}{{2}}}}.")
        is_right.append(right)
    return replies, answers, is_right


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

    # a new batch each time, the same for all: ours grades equal pairs once and remembers them
    batches = [MAKE[kind](rng, count) for _ in range(MOST_ROUNDS)]

    def once(name: str) -> Callable[[], None]:
        left = iter(batches)
        return lambda: graders[name](next(left))

    runs = {name: whole(machine, once(name)) for name in names}
    for name, times in rounds(RoundRobin(machine, runs)).items():
        table.append({"case": kind, "replies": count, "contender": name, **times})
