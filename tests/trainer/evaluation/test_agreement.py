"""Comparing stated answers: once per pair, under a deadline, with progress, until a signal stops it."""

from contextlib import contextmanager

import pytest

from expo.errors import StopRequested
from expo.evaluation import agreement
from expo.evaluation.agreement import AnswerComparer
from expo.rewards.verifier import Verifier
from expo.runtime.console import Display
from expo.runtime.signals import StopSwitch


class Deadlines:
    """A watchdog that records the current phases."""

    def __init__(self):
        self.now = []

    @contextmanager
    def phase(self, name, seconds):
        self.now.append((name, seconds))
        yield
        self.now.pop()


def test_each_pair_is_compared_once_under_a_deadline_with_progress(monkeypatch, capsys):
    monkeypatch.setattr(agreement, "PAIRS_PER_CHUNK", 2)
    watchdog = Deadlines()
    compared = []
    with Verifier(workers=1) as verifier:

        def agree(pairs):
            assert watchdog.now == [("evaluation", 60)]
            compared.append(list(pairs))
            return verifier.agree(pairs)

        comparer = AnswerComparer(agree, Display(), watchdog, StopSwitch(), deadline_s=60)
        same, other, third = (r"\sin x+1", r"1+\sin x"), (r"\sin x+1", r"\sin x+2"), (r"\ln y+2", r"2+\ln y")
        pairs = [same, ("1", "2"), other, same, third, ("7", "7")]
        assert comparer(pairs) == [True, False, False, True, True, True]
    assert compared == [[same, other], [third]]
    assert "answers compared 3/3" in capsys.readouterr().out


def test_a_stop_request_ends_the_comparison():
    comparer = AnswerComparer(None, Display(), Deadlines(), StopSwitch(save_by_minutes=-1), deadline_s=60)
    with pytest.raises(StopRequested):
        comparer([(r"\sin x+1", r"1+\sin x")])
