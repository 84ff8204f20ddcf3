"""The reward behind the advantages: overlong penalty, reward functions and their failures."""

import sys

import pytest
import torch

import expo.run.lifecycle
from expo.config import RewardSection
from expo.errors import ConfigError, RewardError
from expo.rewards.compose import RewardComposer, load_reward_functions, overlong_penalties
from expo.rewards.groups import GradedRollouts
from expo.runtime.distributed import Ranks
from expo.train import main, train
from expo.types import Prompt, Question, Reply, Verdict
from tests.trainer.test_train import quick, rows_of

pytestmark = pytest.mark.medium

RIGHT, WRONG = Verdict("correct", "1"), Verdict("wrong", "2")
FUNCTIONS = """
import math, sys
not_a_function = 3
def leaves(replies, answers, questions): sys.exit(0)
def interrupts(replies, answers, questions): raise KeyboardInterrupt
def length(replies, answers, questions): return [len(reply) for reply in replies]
def echo(replies, answers, questions): return [float(q == "q" and a == "1") for q, a in zip(questions, answers)]
def too_few(replies, answers, questions): return [1.0]
def nothing(replies, answers, questions): return None
def words(replies, answers, questions): return ["good" for _ in replies]
def not_a_number(replies, answers, questions): return [math.nan for _ in replies]
def infinite(replies, answers, questions): return [math.inf if reply == "cc" else 0.0 for reply in replies]
def chokes(replies, answers, questions):
    if any(len(reply) == 2 for reply in replies): raise ValueError("two\\nlines")
def chokes_on_many(replies, answers, questions): return [1.0 / (2 - len(replies))] * len(replies)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Makes the modules `own_rewards` and `broken_rewards` importable."""
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("def f(:")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return load_reward_functions


def graded():
    """One question, replies "a" (right) and "cc" (wrong), of 3 and 9 tokens."""
    replies = [Reply([5] * 3, [-0.5] * 3, False, "a"), Reply([5] * 9, [-0.5] * 9, True, "cc")]
    return GradedRollouts([Prompt(Question("id", "q", "1"), [5])], [replies], [[RIGHT, WRONG]])


def shaped(load=load_reward_functions, **section):
    section = RewardSection(**section)
    return RewardComposer(section, 10, load(section.functions), Ranks(torch.device("cpu"), 0, 1)).shape(graded())


def test_overlong_penalties_follow_equation_13():
    lengths = torch.tensor([1, 15, 16, 17, 18, 20])
    torch.testing.assert_close(overlong_penalties(lengths, 20, 4), torch.tensor([0, 0, 0, -0.25, -0.5, -1]))


def test_without_further_terms_the_reward_is_the_verdict():
    found = shaped()
    assert torch.equal(found.rewards, found.correct)
    assert found.reward_parts == {}


def test_parts_are_weighted_and_added(functions):
    weights = {"own_rewards:length": 0.5, "own_rewards:echo": 0.25}
    found = shaped(functions, correct_weight=2.0, functions=weights, overlong_buffer=4, overlong_penalty=0.1)
    assert found.correct.tolist() == [[1.0, 0.0]]
    assert found.reward_parts["length"].tolist() == [[1.0, 2.0]]
    assert found.reward_parts["echo"].tolist() == [[1.0, 1.0]]
    assert found.reward_parts["overlong"].tolist() == [[0.0, -0.75]]
    torch.testing.assert_close(found.rewards, torch.tensor([[2 + 0.5 + 0.25, 1 + 0.25 - 0.075]]))
    row = found.rows()[1]
    assert (row["reward"], row["shaped_reward"]) == (0.0, pytest.approx(1.175))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lost_rewards:f", "No module named 'lost_rewards'"),
        ("broken_rewards:f", "SyntaxError"),
        ("leaving_rewards:f", "SystemExit: 0"),
        ("own_rewards:lost", "has no attribute 'lost'"),
        ("own_rewards:not_a_function", "is a int; give the name of a function"),
    ],
)
def test_functions_that_cannot_be_imported_are_named_at_load(functions, name, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        functions([name])
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("too_few", "returned 1 numbers for 2 replies"),
        ("nothing", "returned None; return a list"),
        ("words", r"returned \['good', 'good'\]; return a list"),
        ("infinite", "returned inf for the reply 'cc' to 'q'"),
        ("not_a_number", "returned nan for the reply 'a' to 'q'"),
        ("leaves", "raised SystemExit: 0, given the reply 'a' to 'q'"),
        ("interrupts", "raised KeyboardInterrupt:, given the reply 'a' to 'q'"),
        ("chokes", "raised ValueError: two lines, given the reply 'cc' to 'q'"),
        ("chokes_on_many", "given 2 replies at once, though not given any of them alone"),
    ],
)
def test_functions_that_fail_are_named_with_the_reply(functions, name, expected):
    with pytest.raises(RewardError, match=f"own_rewards:{name} .*{expected}") as error:
        shaped(functions, functions={f"own_rewards:{name}": 1.0})
    assert "\n" not in str(error.value)


def share_of_equal_rewards(replies):
    """Of the groups in completions.jsonl."""
    groups = {}
    for reply in replies:
        groups.setdefault(reply["question_id"], set()).add(reply["shaped_reward"])
    return sum(len(rewards) == 1 for rewards in groups.values()) / len(groups)


def test_shaping_changes_advantages_but_not_accuracy_beta_or_pass_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    plain = train(quick(tmp_path, run__steps=1, optimizer__warmup_steps=0))
    options = {"reward__functions": {"expo.formats:boxed": 0.5}, "reward__overlong_buffer": 20}
    run = train(quick(tmp_path, "shaped", run__steps=1, optimizer__warmup_steps=0, **options))
    (before,), (row,) = rows_of(plain, "metrics"), rows_of(run, "metrics")
    assert row["loss"] != before["loss"]
    for name in ("accuracy", "beta_eff", "completion_length"):
        assert row[name] == before[name]
    for found, of_run in ((before, plain), (row, run)):
        assert found["zero_variance_fraction"] == share_of_equal_rewards(rows_of(of_run, "completions"))
    assert row["zero_variance_fraction"] < before["zero_variance_fraction"]
    assert rows_of(plain, "curriculum") == rows_of(run, "curriculum")
    assert before["reward"] == before["accuracy"]
    assert 0 < row["reward/boxed"] <= 1
    assert -1 <= row["reward/overlong"] < 0
    replies = rows_of(run, "completions")
    assert row["reward"] == pytest.approx(sum(reply["shaped_reward"] for reply in replies) / len(replies))
    assert row["reward"] == pytest.approx(row["accuracy"] + 0.5 * row["reward/boxed"] + row["reward/overlong"])


@pytest.mark.parametrize("name", ["too_few", "leaves", "interrupts"])
@pytest.mark.usefixtures("functions")
def test_a_function_that_fails_ends_the_run_with_one_line(tmp_path, capsys, name):
    path = tmp_path / "config.yaml"
    path.write_text(quick(tmp_path, reward__functions={f"own_rewards:{name}": 1.0}).to_yaml())
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
