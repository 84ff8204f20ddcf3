"""pass@k before and after: intervals of the change and the plain-text table."""

import pytest

from expo.reporting.comparison import Estimate, difference, results_table
from tests.trainer.reporting.run_folders import one_set


def test_interval_of_a_difference_adds_half_widths_in_quadrature() -> None:
    found = difference(Estimate(0.4, 0.37, 0.44), Estimate(0.7, 0.67, 0.74))
    # below: 0.03 of after and 0.04 of before; above: 0.04 and 0.03; a 3-4-5 triangle either way
    assert found == pytest.approx((0.30, 0.25, 0.35))


def test_results_table_equals_numbers_worked_by_hand() -> None:
    before = one_set(0.4, 0.37, 0.44)
    after = one_set(0.7, 0.67, 0.74)
    after["held_out"]["pass_at"]["8"] = {"mean": 0.9, "low": 0.88, "high": 0.93}
    assert results_table(before, after).splitlines() == [
        "set       n    metric  before [95 %]         after [95 %]          change [95 %]",
        "--------  ---  ------  --------------------  --------------------  -----------------------",
        "held_out  240  pass@1  0.400 [0.370, 0.440]  0.700 [0.670, 0.740]  +0.300 [+0.250, +0.350]",
        "held_out  240  pass@8  -                     0.900 [0.880, 0.930]  -",
    ]


def test_results_table_without_a_second_evaluation_shows_the_first() -> None:
    assert results_table(one_set(0.4, 0.37, 0.43), {}).splitlines()[-1].split() == [
        *("held_out", "240", "pass@1", "0.400", "[0.370,", "0.430]", "-", "-")
    ]
