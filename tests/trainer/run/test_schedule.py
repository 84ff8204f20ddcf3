"""When a run ends, and after which steps it evaluates and saves."""

import pytest
import torch

from expo.config import RunSection
from expo.run.checkpoint import Position
from expo.run.schedule import is_due, is_over


@pytest.mark.parametrize(("step", "every", "expected"), [(4, 2, True), (3, 2, False), (4, 0, False)])
def test_what_is_done_every_so_many_steps(step, every, expected):
    assert is_due(step, every) == expected


@pytest.mark.parametrize(
    ("step", "reply_tokens", "expected"), [(9, 99, False), (10, 0, True), (1, 100, True), (1, 101, True)]
)
def test_a_run_ends_by_steps_or_by_its_token_budget(step, reply_tokens, expected):
    position = Position(step, {}, torch.Generator().get_state(), reply_tokens=reply_tokens)
    assert is_over(RunSection(steps=10, reply_tokens=100), position) == expected
    assert is_over(RunSection(steps=10), position) == (step == 10)
