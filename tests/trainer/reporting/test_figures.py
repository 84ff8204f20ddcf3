"""Values that figures compute, worked by hand; `test_report.py` draws the figures of runs."""

import math

import pytest

from expo.reporting.figures.curriculum import gaussian_weight
from expo.reporting.figures.steps import smooth, tanh_rho


def test_curves_follow_the_paper() -> None:
    assert tanh_rho(0.0) == 0.5
    assert tanh_rho(1.0) == pytest.approx(0.88080, abs=1e-5)
    assert gaussian_weight(0.5, 0.5, 0.35) == 1.0
    assert gaussian_weight(0.0, 0.5, 0.35) == pytest.approx(0.3604, abs=1e-4)


def test_smooth_is_a_centred_mean_that_skips_gaps() -> None:
    assert smooth([1.0, 2.0, math.nan, 4.0, 6.0], 3) == [1.5, 1.5, 3.0, 5.0, 5.0]
    assert math.isnan(smooth([math.nan], 1)[0])
