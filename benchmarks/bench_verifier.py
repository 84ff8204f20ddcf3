"""Replies graded per second: the verifier, in its worker processes, beside TRL's accuracy_reward in the caller's own.

Both use math-verify. Ours judges plain numbers without it, and its workers can be killed where an answer hangs.
"""

import importlib.util
import random
from collections.abc import Callable

import pytest

from benchmarks.machine import Pairs, whole
from expo.rewards import Verifier

COUNTS = {"numbers": 2000, "formulas": 40}  # replies of a batch
Batch = tuple[list[str], list[str], list[bool]]  # replies, answers, whether each is right


def numbers(rng: random.Random, count: int) -> Batch:
    """Integers, as the answers of most benchmarks are; half of the replies are right."""
    answers = [rng.randrange(1000) for _ in range(count)]
    is_right = [rng.random() < 0.5 for _ in range(count)]
    said = [answer + (not right) for answer, right in zip(answers, is_right, strict=True)]
    return [f"So the total is \\boxed{{{value}}}." for value in said], [str(answer) for answer in answers], is_right


def formulas(rng: random.Random, count: int) -> Batch:
    """Expressions that only algebra can compare, all different; half of the replies are right."""
    replies, answers, is_right = [], [], []
    for _ in range(count):
        a, b, right = rng.randrange(2, 10**6), rng.randrange(2, 10**6), rng.random() < 0.5
        answers.append(rf"\frac{{{a} + \sqrt{{{b}}}}}{{2}}")
        replies.append(rf"It is \boxed{{\frac{{\sqrt{{{b}}}}}{{2}} + \frac{{{a + (not right)}}}{{2}}}}.")
        is_right.append(right)
    return replies, answers, is_right


MAKE: dict[str, Callable[[random.Random, int], Batch]] = {"numbers": numbers, "formulas": formulas}


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


@pytest.mark.parametrize("name", GRADERS)
@pytest.mark.parametrize("kind", MAKE)
def test_verifier(kind, name, machine, table, rounds, verifier, is_tiny):
    if name != "expo" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    rng, count = random.Random(0), 10 if is_tiny else COUNTS[kind]
    grade = GRADERS[name](verifier)
    first = MAKE[kind](rng, count)
    assert grade(first) == first[2]

    def run() -> None:
        grade(held.pop())  # a new batch each time: equal pairs are graded once and remembered

    held = [MAKE[kind](rng, count) for _ in range(40)]
    pairs = Pairs(machine, lambda: None)
    table.append({"case": kind, "replies": count, "contender": name, **rounds(pairs, whole(pairs, run))})
