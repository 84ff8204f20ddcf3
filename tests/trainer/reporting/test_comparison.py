"""pass@k before and after: intervals of the change and the plain-text table."""

import pytest

from expo.reporting.comparison import Comparison, Estimate, comparison_text, difference, results_table
from tests.trainer.reporting.run_folders import one_set


def test_interval_of_a_difference_adds_half_widths_in_quadrature() -> None:
    found = difference(Estimate(0.4, 0.37, 0.44), Estimate(0.7, 0.67, 0.74))
    # below: 0.03 of after and 0.04 of before; above: 0.04 and 0.03; a 3-4-5 triangle either way
    assert found is not None
    assert found[:3] == pytest.approx((0.30, 0.25, 0.35))


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


@pytest.mark.parametrize(
    ("change", "num_questions", "num_differing", "trend"),
    [
        ((0.3, 0.1, 0.5), 240, None, "up"),
        ((-0.3, -0.5, -0.1), 240, 6, "down"),
        ((0.3, 0.0, 0.5), 240, None, ""),
        ((0.0, -0.2, 0.2), 240, 0, ""),
        ((0.9, 0.1, 1.0), 5, None, ""),
        ((0.9, 0.1, 1.0), 6, None, "up"),
        ((0.9, 0.1, 1.0), 240, 5, ""),
        ((0.9, 0.1, 1.0), None, None, "up"),
    ],
)
def test_a_change_is_claimed_only_if_interval_and_questions_permit_it(
    change: tuple[float, float, float], num_questions: int | None, num_differing: int | None, trend: str
) -> None:
    row = Comparison("set", num_questions, "pass@1", None, None, Estimate(*change), num_differing)
    assert (row.trend, row.remark) == (trend, "" if trend else "too few to tell")
    assert comparison_text(["header"] * 6, [row]).endswith("too few to tell") is not bool(trend)


def test_without_a_change_there_is_nothing_to_tell() -> None:
    row = Comparison("set", 3, "pass@1", None, None, None)
    assert (row.trend, row.remark) == ("", "")


def test_wilson_intervals_are_marked_and_explained() -> None:
    before = one_set(0.0, 0.0, 0.2)
    before["held_out"]["pass_at"]["1"]["interval"] = "wilson"
    table = results_table(before, one_set(0.5, 0.4, 0.6))
    assert "0.000 [0.000, 0.200]*  0.500 [0.400, 0.600]  +0.500 [+0.276, +0.600]*" in table
    assert table.splitlines()[-1].startswith("* Wilson's interval with n = questions")
    assert "Wilson" not in results_table(one_set(0.0, 0.0, 0.2), one_set(0.5, 0.4, 0.6))
