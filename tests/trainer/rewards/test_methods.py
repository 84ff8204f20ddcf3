"""The verifiers that `reward.verifier` names, thinking, and operations that are still to be computed."""

import sys

import pytest

pytest.importorskip("math_verify")

from expo.config import EvalConfig, RewardSection
from expo.errors import ConfigError, GraderError
from expo.evaluation.protocol import evaluation_protocol
from expo.rewards.answers import extract_answer
from expo.rewards.build import build_verifier, check_verifier
from expo.rewards.families import entry_gold
from expo.rewards.groups import fractions
from expo.rewards.methods import Reading, find_method
from expo.rewards.verifier import Verifier, ungradable_answers

pytestmark = pytest.mark.medium

OWN = """
def length(reply, answer):
    return len(reply) == len(answer)

def kinds(reply, answer):
    return reply

def slow(reply, answer):
    while True:
        pass

def broken(reply, answer):
    return reply[99]

def leaves(reply, answer):
    raise SystemExit(0)

def interrupts(reply, answer):
    raise KeyboardInterrupt
"""


def kinds(verifier, replies, answers):
    with verifier:
        return [verdict.kind for verdict in verifier.grade(replies, answers)]


# ---- thinking


@pytest.mark.parametrize(
    ("reply", "is_thinking", "answer"),
    [
        (r"<think>\boxed{8}</think> \boxed{7}", False, "7"),
        (r"<think>\boxed{7}</think> I think 8.", False, None),
        (r"<think> so \boxed{7}. Hmm, wait", False, None),
        (r"\boxed{7} <think> is that so", False, None),
        (r"<think>a</think> \boxed{1} <think>b</think> \boxed{2}", False, "2"),
        (r"<think>a</think> \boxed{1} <think> \boxed{2}", False, None),
        ("<think>Answer: 7</think> done", False, None),
        ("<think>hm</think>Answer: 7", False, "7"),
        # the prompt has opened the tag
        (r"so \boxed{7}. Hmm, wait", True, None),
        (r"so \boxed{7}</think> \boxed{8}", True, "8"),
        (r"\boxed{7}", False, "7"),
    ],
)
def test_thinking_is_not_read(reply, is_thinking, answer):
    assert extract_answer(reply, is_thinking=is_thinking) == answer


def test_other_tags_by_setting():
    section = RewardSection(think_tags={"[T]": "[/T]"})
    verifier = build_verifier(section, "Question: 3 + 4?")
    assert kinds(verifier, [r"[T]\boxed{7}[/T] eight", r"<think>\boxed{7}"], ["7", "7"]) == ["unparsed", "correct"]


def test_a_prompt_that_opens_the_tag_starts_replies_inside_the_thinking():
    opened = build_verifier(RewardSection(), "<|user|>3 + 4?<|assistant|><think>\n")
    assert kinds(opened, [r"\boxed{7}", r"hm</think>\boxed{7}"], ["7", "7"]) == ["unparsed", "correct"]


# ---- operations


@pytest.mark.parametrize("form", [r"12 \times 12", "100 + 44", "288/2", r"\gcd(144, 288)", r"\sum_{k=1}^{12} 12"])
def test_an_operation_earns_nothing_and_is_counted_apart(form):
    reply = rf"\boxed{{{form}}}"
    with Verifier(workers=1) as strict, Verifier(workers=1, accept_unevaluated=True) as lenient:
        (refused,), (accepted,) = strict.grade([reply], ["144"]), lenient.grade([reply], ["144"])
        assert (refused.kind, refused.reward, refused.is_unevaluated) == ("wrong", 0.0, True)
        assert (accepted.kind, accepted.is_unevaluated) == ("correct", True)
        (other,) = lenient.grade([reply], ["145"])
        assert (other.kind, other.is_unevaluated) == ("wrong", False)


def test_the_setting_says_which_rule_holds():
    reply, gold = [r"\boxed{12 \times 12}"], ["144"]
    assert kinds(build_verifier(RewardSection(), ""), reply, gold) == ["wrong"]
    assert kinds(build_verifier(RewardSection(unevaluated="accept"), ""), reply, gold) == ["correct"]


def test_an_evaluation_writes_its_rule_into_the_protocol():
    config = EvalConfig(model={"path": "m"}, reward={"unevaluated": "accept", "verifier": "choice"})
    protocol = evaluation_protocol(config)
    assert (protocol["unevaluated"], protocol["verifier"]) == ("accept", "choice")
    assert protocol["think_tags"] == {"<think>": "</think>"}


def test_unevaluated_replies_are_counted():
    kinds, is_unevaluated = ["wrong", "wrong", "correct", "unparsed"], [True, False, False, False]
    assert fractions(kinds, [False] * 4, is_unevaluated)["unevaluated_fraction"] == 0.25


def test_checking_gold_answers_reports_its_progress():
    reports = []
    golds = [str(number) for number in range(1200)]
    assert ungradable_answers(golds, on_progress=lambda done, total: reports.append((done, total))) == []
    assert reports == [(500, 1200), (1000, 1200), (1200, 1200)]


# ---- verifiers


def test_exact_compares_texts():
    verifier = Verifier(method="exact")
    golds = ["x+1", "x+1", "Yes", "Yes"]
    replies = [r"\boxed{$x + 1$}", r"\boxed{1+x}", r"\boxed{\textbf{Yes}}", "yes"]
    assert kinds(verifier, replies, golds) == ["correct", "wrong", "wrong", "unparsed"]


def test_choice_compares_letters():
    stated = ["B", "(b)", "B. 7", r"\textbf{(B)}\ 7", r"\text{Option B}", "C", "7", "B, C", "BC"]
    verifier = Verifier(method="choice")
    found = kinds(verifier, [rf"\boxed{{{text}}}" for text in stated], ["(B)"] * len(stated))
    assert found == ["correct"] * 5 + ["wrong"] * 4
    assert ungradable_answers(["B", "(C)", "7", "Paris"], method="choice") == ["7", "Paris"]


@pytest.fixture
def own_verifiers(tmp_path, monkeypatch):
    (tmp_path / "own_verifiers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_verifiers", None)


@pytest.mark.usefixtures("own_verifiers")
def test_a_function_of_the_user_gives_the_verdicts():
    check_verifier("own_verifiers:length")
    replies = ["abc", "<think>x</think>abc", "abcd", "<think>abc"]
    assert kinds(Verifier(method="own_verifiers:length"), replies, ["xyz"] * 4) == [
        "correct", "correct", "wrong", "unparsed",
    ]  # fmt: skip
    named = ["correct", "wrong", "unparsed", "timeout"]
    assert kinds(Verifier(method="own_verifiers:kinds"), named, [""] * 4) == named


@pytest.mark.usefixtures("own_verifiers")
@pytest.mark.parametrize(("name", "error"), [("leaves", "SystemExit: 0"), ("interrupts", "KeyboardInterrupt: ")])
def test_a_function_of_the_user_cannot_end_its_worker(name, error):
    with pytest.raises(GraderError, match=f"own_verifiers:{name} raised {error}"):
        kinds(Verifier(method=f"own_verifiers:{name}"), ["a"], ["b"])


@pytest.mark.usefixtures("own_verifiers")
def test_a_function_of_the_user_has_a_deadline_and_its_errors_are_named():
    assert kinds(Verifier(timeout_s=0.5, method="own_verifiers:slow"), ["a"], ["b"]) == ["timeout"]
    with pytest.raises(GraderError, match="own_verifiers:broken raised IndexError"):
        kinds(Verifier(method="own_verifiers:broken"), ["a"], ["b"])
    with pytest.raises(GraderError, match="own_verifiers:kinds returned 'maybe'; return True, False or one of"):
        kinds(Verifier(method="own_verifiers:kinds"), ["maybe"], ["b"])


def test_a_verifier_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"reward.verifier: lost_verifiers:f cannot be imported"):
        check_verifier("lost_verifiers:f")
    with pytest.raises(ValueError, match="verifier 'maths' is unknown; give one of math, exact, choice, reasoning-gym"):
        find_method("maths")
    with pytest.raises(ValueError, match="verifier"):
        RewardSection(verifier="maths")


def test_reasoning_gyms_scorer_grades_entries_and_mathematics_the_rest():
    factory = pytest.importorskip("reasoning_gym.factory", reason="needs expo-rl[reasoning]")
    item = factory.create_dataset("countdown", size=1, seed=0)[0]
    gold = entry_gold("countdown", item)
    replies = [rf"\boxed{{{item['answer']}}}", rf"\boxed{{{item['metadata']['target']}}}", r"\boxed{\sqrt{8}}"]
    verifier = Verifier(method="reasoning-gym")
    assert kinds(verifier, replies, [gold, gold, r"2\sqrt2"]) == ["correct", "wrong", "correct"]


def test_the_default_reading_knows_no_open_thinking():
    assert Reading().answer(r"\boxed{7}") == "7"
