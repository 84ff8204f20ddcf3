"""Paired differences and what they are worth: t intervals, and a correction for how many are looked at.

Sources: the t distribution for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4; Holm 1979
(Scandinavian Journal of Statistics 6:65).
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95  # of intervals; 1 - LEVEL is the chance of at least one false claim among all that are made


class Mean(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float


class Difference(NamedTuple):
    """A mean paired difference, its standard error, 95 % t interval and two-sided p, none of it corrected."""

    mean: float
    error: float
    low: float
    high: float
    p: float


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error of two values or more."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """How much larger `values` are than `baseline`, pair by pair; two pairs or more."""
    mean, error = mean_over_seeds([value - base for value, base in zip(values, baseline, strict=True)])
    half = t_quantile(LEVEL, len(values) - 1) * error
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    return Difference(mean, error, mean - half, mean + half, 1 - t_inside(t, len(values) - 1))


def t_inside(t: float, degrees: int) -> float:
    """Chance that |T| < t, t >= 0, for T of Student's distribution with whole degrees of freedom >= 1."""
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    # cos^k(angle) times (2 * 4 * ...) / (3 * 5 * ...) for odd degrees, (1 * 3 * ...) / (2 * 4 * ...) for even ones
    term, total = (math.cos(angle) if is_odd else 1.0), 0.0
    for k in range(is_odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


def t_quantile(inside: float, degrees: int) -> float:
    """The t with chance `inside` in (0, 1) that |T| < t."""
    low, high = 0.0, 1.0
    while t_inside(high, degrees) < inside:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, degrees) < inside else (low, middle)
    return high


def holm(ps: Sequence[float]) -> list[bool]:
    """Which of all p values looked at are beyond noise, with a chance of at most 5 % that any is wrongly said to be."""
    beyond = [False] * len(ps)
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] > (1 - LEVEL) / (len(ps) - rank):
            break
        beyond[index] = True
    return beyond
