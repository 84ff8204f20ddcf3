"""The verifier on gold answers of every kind, on random pairs, on replies that try to earn without solving."""

import json
import random
import re
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from expo.rewards.extract import extract_answer
from expo.rewards.maths.compare import Outcome
from expo.rewards.methods import MathMethod
from expo.rewards.verifier import Verifier, ungradable_answers
from tests.trainer.rewards.answer_pairs import MAKERS, answer_pairs, grade_pairs

pytestmark = pytest.mark.medium

# in the formats of MATH-500, OlympiadBench, Minerva and AMC; about half of the stated answers are wrong
KINDS = [json.loads(line) for line in Path(__file__).with_name("kinds.jsonl").read_text().splitlines()]
# replies that earn the reward of a question in a lenient verifier without computing its answer, or hedge
GAMES = {
    "restates the question": r"\boxed{<question>}",
    "restates it as an equation": r"\boxed{x = <question>}",
    "echoes the prompt": "What is <question>?\nAnswer: <question>",
    "leaves the box empty": r"\boxed{}",
    "lists numbers": r"\boxed{<list>}",
    "lists boxes": r"\boxed{<gold>} or \boxed{<other>}",
    "an interval that covers": r"\boxed{[<low>, <high>]}",
    "an inequality that covers": r"\boxed{<low> \le x \le <high>}",
    "all numbers": r"\boxed{\mathbb{R}}",
    "a variable": r"\boxed{x}",
    "a tautology": r"\boxed{x = x}",
    "a macro": r"\def\answer{<question>}\boxed{\answer}",
    "a word": r"\boxed{\text{correct}}",
    "the answer by name": r"\boxed{\text{answer}}",
    "plus or minus": r"\boxed{<gold> \pm 1}",
    "a sum with zero": r"\boxed{<question> + 0}",
    "a product with one": r"\boxed{1 \cdot (<question>)}",
    "a function": r"\boxed{\max(<question>, -10^9)}",
    "a sum sign": r"\boxed{\sum_{k=1}^{1} (<question>)}",
    "a floor": r"\boxed{\lfloor <question> \rfloor}",
    "a root of a square": r"\boxed{\sqrt{(<question>)^2}}",
    "only thinks": r"<think>\boxed{<gold>}</think> done",
    "never stops thinking": r"<think>\boxed{<gold>}",
    "two answers": r"\boxed{<gold> \text{ or } <other>}",
    "never closes the box": r"\boxed{<gold>",
    "says it in prose": "The answer is <gold>.",
    "changes the value by a word": r"\boxed{<gold> \text{ or more}}",
}
FAMILIES = ("chain_sum", "basic_arithmetic", "gcd", "lcm", "products")


def arithmetic(count):
    """Questions as expressions, and their answers."""
    draw = random.Random(5)
    found = []
    while len(found) < count:
        terms = [str(draw.randint(2, 99)) for _ in range(draw.randint(2, 4))]
        question = terms[0] + "".join(f" {draw.choice('+-*')} {term}" for term in terms[1:])
        found.append((question, str(eval(question))))
    return found


def reasoning(count):
    """The expressions in reasoning-gym's questions, and their answers."""
    factory = pytest.importorskip("reasoning_gym.factory", reason="needs expo-rl[reasoning]")
    found = []
    for family in FAMILIES:
        for item in factory.create_dataset(family, size=-(-count // len(FAMILIES)), seed=3):
            numbers = max(re.findall(r"[-(\d][-\d\s+*/().,]*[\d)]", item["question"]), key=len).strip()
            question = rf"\operatorname{{{family}}}({numbers})" if family in ("gcd", "lcm") else numbers
            found.append((question, str(item["answer"])))
    return found[:count]


def successful_games(questions):
    """The games that earn something, each with its reply and gold answer."""
    names, replies, golds = [], [], []
    for question, gold in questions:
        value = int(gold)
        values = {
            "question": question, "gold": gold, "other": str(value + 1),
            "low": str(-abs(value) - 9), "high": str(abs(value) + 9),
            "list": ", ".join(map(str, range(value - 5, value + 5))),
        }  # fmt: skip
        for name, game in GAMES.items():
            names.append(name)
            replies.append(re.sub(r"<(\w+)>", lambda mark, v=values: v.get(mark[1], mark[0]), game))
            golds.append(gold)
    with Verifier(workers=2, timeout_s=30.0) as verifier:
        rewards = [verdict.reward for verdict in verifier.grade(replies, golds)]
    return [
        (name, reply, gold) for name, reply, gold, reward in zip(names, replies, golds, rewards, strict=True) if reward
    ]


# ---- kinds


@pytest.fixture(scope="module")
def verdicts():
    with Verifier(workers=2, timeout_s=60.0) as verifier:
        return verifier.grade([rf"\boxed{{{case['stated']}}}" for case in KINDS], [case["answer"] for case in KINDS])


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_kinds(index, verdicts):
    assert verdicts[index].kind == KINDS[index]["verdict"], KINDS[index]


def test_every_gold_answer_of_the_kinds_can_be_graded_against():
    assert ungradable_answers(case["answer"] for case in KINDS) == []


@pytest.mark.parametrize("gold", ["", "proof", "notfound", r"\text{proof}", "nan", "null", "Not Found", r"\frac{1}{"])
def test_a_gold_answer_that_is_none_is_found(gold):
    assert ungradable_answers([gold, "7", "Monday"]) == [gold]


# ---- random pairs


def check_pairs(count):
    pairs = list(answer_pairs(seed=1, count=count))
    wrongly_correct, missed = grade_pairs(pairs)
    assert wrongly_correct == []
    assert len(missed) <= 0.005 * sum(pair.is_equal for pair in pairs), missed[:20]


def test_random_pairs():
    check_pairs(40 * len(MAKERS))


@pytest.mark.slow
def test_twenty_thousand_random_pairs():
    check_pairs(20_000)


# ---- games


@pytest.mark.parametrize("draw", [arithmetic, reasoning])
def test_games_earn_nothing(draw):
    assert successful_games(draw(30)) == []


@pytest.mark.slow
@pytest.mark.parametrize("draw", [arithmetic, reasoning])
def test_games_earn_nothing_on_five_hundred_questions(draw):
    assert successful_games(draw(500)) == []


def test_the_true_answer_earns_on_the_same_questions():
    questions = arithmetic(30)
    with Verifier() as verifier:
        found = verifier.grade([rf"\boxed{{{gold}}}" for _, gold in questions], [gold for _, gold in questions])
    assert all(verdict.reward for verdict in found)


# ---- long replies

PIECES = (
    r"\boxed{", "{", "}", "\\", "answer ", r"\boxed{1},", "answer" + " " * 50, "\n", "so ", "Answer: 1 ", "<think>",
    "</think>", r"\boxed{1}{", "答案", "boxed", "\nAnswer:", r"\boxed{" + "x" * 1990, r"\boxed{a} and ", "$", r"\fbox",
    "nswer", r"Answer: \boxed{", "，", "((((", r"\boxed{{",
)  # fmt: skip
MS_PER_MB = 50.0


@pytest.mark.parametrize("piece", PIECES)
def test_finding_the_answer_is_linear_in_the_reply(piece):
    reply = piece * (2_000_000 // len(piece))
    times = []
    for _ in range(5):  # other programs may use the cores
        started = time.thread_time()
        extract_answer(reply)
        times.append(1000 * (time.thread_time() - started) / 2)
        if times[-1] < MS_PER_MB:
            break
    assert min(times) < MS_PER_MB


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "(",
        r"\frac{",
        "1,",
        "-",
        r"\text{a}",
        "x=",
        "^{2",
        "[1,",
        "a ",
        ",",
        r"\pm ",
        "5_",
        "((x)",
        "x+",
        "9^",
        "<",
        "|",
    ],
)
def test_an_answer_of_the_greatest_length_is_judged_at_once(piece):
    method = MathMethod()
    pair = method.pair(piece * (1_900 // len(piece)), "7")
    started = time.thread_time()
    outcome = method.decide(*pair)
    assert time.thread_time() - started < 1.0
    assert outcome in (Outcome.WRONG, Outcome.UNKNOWN)
