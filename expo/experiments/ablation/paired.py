"""Paired differences: t intervals, paired t tests, and Holm's correction for multiple tests.

Sources: the t distribution for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4; Holm 1979
(Scandinavian Journal of Statistics 6:65).
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95  # confidence level of intervals; 1 - LEVEL is the family-wise error rate of Holm's correction


class Mean(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float


class Difference(NamedTuple):
    """A mean paired difference, its standard error, 95 % t interval and two-sided p value, all uncorrected."""

    mean: float
    error: float
    low: float
    high: float
    p: float


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least two values."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The paired difference `values - baseline` of at least two pairs."""
    mean, error = mean_over_seeds([value - base for value, base in zip(values, baseline, strict=True)])
    half = t_quantile(LEVEL, len(values) - 1) * error
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    return Difference(mean, error, mean - half, mean + half, 1 - t_probability(t, len(values) - 1))


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) for t >= 0 and T of Student's t distribution with an integer number of degrees of freedom >= 1."""
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    # cos^k(angle) times (2 * 4 * ...) / (3 * 5 * ...) for odd degrees, (1 * 3 * ...) / (2 * 4 * ...) for even ones
    term, total = (math.cos(angle) if is_odd else 1.0), 0.0
    for k in range(is_odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(|T| < t) = `probability` in (0, 1)."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return high


def holm(ps: Sequence[float]) -> list[bool]:
    """Which p values are significant after Holm's correction, at a family-wise error rate of 5 %."""
    significant = [False] * len(ps)
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] > (1 - LEVEL) / (len(ps) - rank):
            break
        significant[index] = True
    return significant
