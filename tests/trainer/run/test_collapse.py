"""Signs of a collapse with finite numbers: when each is named, when it counts, and that a resumed run counts alike."""

import pytest

from expo.config import RunSection
from expo.run.collapse import CollapseWatch

HEALTHY = {"accuracy": 0.5, "kl": 0.1, "grad_norm": 1.0, "truncated_fraction": 0.0}
STEPS = 3


def watch(updates_per_step=1):
    return CollapseWatch(RunSection(collapse_steps=STEPS, collapse_kl=2.0), updates_per_step)


def seen(*rows, **options):
    """A watch that has seen rows, each given by what differs from a healthy one."""
    found = watch(**options)
    found.replay({**HEALTHY, **row} for row in rows)
    return found


def test_a_healthy_run_shows_no_sign():
    found = seen(*[{}] * 20)
    assert found.is_clear
    assert (found.signs, found.new_signs, found.collapse) == ([], [], [])


@pytest.mark.parametrize(
    ("row", "text"), [({"kl": 9.6}, "KL above run.collapse_kl = 2"), ({"accuracy": 0.0}, "accuracy fell to 0")]
)
def test_a_sign_is_named_when_it_begins_and_counts_when_it_lasts(row, text):
    first = seen({}, row)
    assert (first.signs, first.new_signs, first.collapse, first.is_clear) == ([text], [text], [], False)
    second = seen({}, row, row)
    assert (second.signs, second.new_signs, second.collapse) == ([f"{text} for 2 steps"], [], [])
    assert seen({}, row, row, row).collapse == [f"{text} for 3 steps"]
    assert seen({}, row, row, {}, row, row).collapse == [], "it counts steps in a row"


@pytest.mark.parametrize(("updates_per_step", "steps"), [(1, 3), (2, 2), (4, 1)])
def test_a_gradient_of_0_counts_by_updates(updates_per_step, steps):
    flat = {"grad_norm": 0.0}
    before = seen(*[flat] * (steps - 1), updates_per_step=updates_per_step)
    assert before.signs == before.collapse == []
    after = seen(*[flat] * steps, updates_per_step=updates_per_step)
    assert after.collapse == after.new_signs == [f"gradient 0 for {steps * updates_per_step} updates"]


def test_truncated_replies_count_when_they_last():
    cut = {"truncated_fraction": 1.0}
    assert seen(cut, cut).signs == []
    assert not seen(cut).is_clear
    assert seen(cut, cut, cut).collapse == ["all replies truncated for 3 steps"]


def test_accuracy_0_is_no_sign_where_it_was_near_0_before():
    assert seen(*[{"accuracy": 0.0}] * 9).is_clear
    assert seen(*[{"accuracy": value} for value in (0.0, 0.1, 0.0, 0.0)]).is_clear


def test_values_that_are_not_finite_are_no_signs_here():
    assert seen({"kl": None, "grad_norm": None}).is_clear
