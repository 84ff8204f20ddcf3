"""What the ranks of a run compare: every difference of settings, questions and prompts has a name of its own."""

from dataclasses import replace

import pytest

from expo.config import load_config
from expo.data import QuestionSet
from expo.run.rank_inputs import require_same_inputs, require_same_settings
from expo.types import Prompt, Question

QUESTIONS = tuple(Question(str(number), f"{number}+4=", str(number + 4)) for number in range(3))


class OneRank:
    """Keeps what a rank compares."""

    def require_equal(self, facts, remedy):
        self.facts, self.remedy = dict(facts), remedy


def facts_of(questions=QUESTIONS, prompt_ids=(1, 2), model=None):
    rank, loaded = OneRank(), QuestionSet("here", tuple(questions))
    prompts = [Prompt(question, [*prompt_ids]) for question in questions]
    require_same_inputs({"data.train": loaded}, {"data.train": prompts}, model or {"config.json": "1"}, rank)
    return rank.facts


def differing(**changes):
    before, after = facts_of(), facts_of(**changes)
    assert list(before) == list(after)
    return [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize(
    "change", [{"answer": "9"}, {"alternatives": ("9",)}], ids=["another answer", "a further answer"]
)
def test_answers(change):
    assert differing(questions=[*QUESTIONS[:2], replace(QUESTIONS[2], **change)]) == ["the answers of data.train"]


@pytest.mark.parametrize("change", [{"text": "9+9="}, {"system": "Be brief."}, {"level": "2"}])
def test_questions(change):
    assert differing(questions=[*QUESTIONS[:2], replace(QUESTIONS[2], **change)]) == ["the questions of data.train"]


def test_the_order_the_prompts_and_the_model():
    assert differing(questions=QUESTIONS[::-1]) == ["the order of the questions of data.train"]
    assert differing(questions=QUESTIONS[:2])[0] == "the number of questions of data.train"
    assert differing(prompt_ids=(1, 3)) == ["the prompts of data.train"]
    assert differing(model={"config.json": "2"}) == ["config.json of model.path"]


def test_every_setting_and_the_flag_to_resume_are_compared():
    rank, other = OneRank(), OneRank()
    require_same_settings(load_config(None), rank)
    require_same_settings(load_config(None, [("optimizer.lr", 1e-3)]), other, resume=True)
    assert set(load_config(None).settings) < set(rank.facts)
    assert [name for name in rank.facts if rank.facts[name] != other.facts[name]] == ["optimizer.lr", "--resume"]
