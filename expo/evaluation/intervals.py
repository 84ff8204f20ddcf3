"""95 % intervals of means over questions, and of paired differences.

The questions are the sample: the replies to one question depend on each other, so n is the number of questions. An
interval is a percentile bootstrap over questions, except where that is too narrow: questions that all have one score
have no spread to resample, and 0 of 16 correct would give [0, 0]. Such means have Wilson's score interval with
n = questions. It assumes the variance mean * (1 - mean), that of scores of 0 and 1; scores between them have less, so
it is not too narrow for them.

Source: Wilson 1927 (JASA 22:209), without continuity correction; for differences Zou and Donner 2008 (Statistics in
Medicine 27:1693), which combines the intervals of two shares that depend on each other.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expo.reporting.comparison import BOOTSTRAP, WILSON

NUM_RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then vary by less than 5 % of its width
FEWEST_QUESTIONS = 10  # of a bootstrap: with fewer, its intervals are too narrow
FEWEST_OTHER_SCORES = 4  # of a bootstrap: with m of n questions off the others' score, exp(-m) of the resamples miss
# them, and for m = 3 these are 5 %: the interval would end at that score
Z = 1.959964  # 97.5 % quantile of the normal distribution


def mean_with_interval(scores: Sequence[float]) -> dict[str, Any]:
    """The mean over questions and its 95 % interval, as mean, low, high, and interval: "bootstrap" or "wilson".

    Args:
        scores: one for each question, in [0, 1].

    Raises: ValueError if there are none, or one is not a number in [0, 1].
    """
    _check(scores, 0.0)
    mean = math.fsum(scores) / len(scores)
    if _bootstrap_is_too_narrow(scores):
        low, high = wilson(mean, len(scores))
        return _interval(mean, low, high, WILSON)
    return _interval(mean, *_bootstrap(scores), BOOTSTRAP)


def difference_with_interval(gains: Sequence[float]) -> dict[str, Any]:
    """The mean of paired differences over questions and its 95 % interval, in the form of `mean_with_interval`.

    Where a bootstrap is too narrow, the mean is that of the gains minus that of the losses; each has Wilson's interval,
    and the two are combined with their correlation. So n questions without any difference give -u to u, where
    u = z^2 / (n + z^2).

    Args:
        gains: one for each question, in [-1, 1].

    Raises: ValueError if there are none, or one is not a number in [-1, 1].
    """
    _check(gains, -1.0)
    mean = math.fsum(gains) / len(gains)
    if not _bootstrap_is_too_narrow(gains):
        return _interval(mean, *_bootstrap(gains), BOOTSTRAP)
    gain, loss = (math.fsum(max(sign * value, 0.0) for value in gains) / len(gains) for sign in (1, -1))
    (gain_low, gain_high), (loss_low, loss_high) = wilson(gain, len(gains)), wilson(loss, len(gains))
    # of two shares of one sample, negative
    correlation = -math.sqrt(gain * loss / ((1 - gain) * (1 - loss))) if gain < 1 and loss < 1 else 0.0
    low = mean - _combined(gain - gain_low, loss_high - loss, correlation)
    high = mean + _combined(gain_high - gain, loss - loss_low, correlation)
    return _interval(mean, max(low, -1.0), min(high, 1.0), WILSON)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: its ends, within [0, 1].

    Args:
        mean: the share, in [0, 1].
        n: the number of observations, at least 1.
    """
    center = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)


def _combined(half_width: float, other: float, correlation: float) -> float:
    return math.sqrt(max(half_width**2 + other**2 - 2 * correlation * half_width * other, 0.0))


def _check(values: Sequence[float], least: float) -> None:
    if not values:
        raise ValueError("no question has a score; expected one or more")
    for value in values:
        if not least <= value <= 1.0:
            raise ValueError(f"a question has the score {value}; expected a number from {least:g} to 1")


def _bootstrap_is_too_narrow(values: Sequence[float]) -> bool:
    if len(values) < FEWEST_QUESTIONS or all(value in (-1.0, 0.0, 1.0) for value in values):
        return True
    ((_, num_equal),) = Counter(round(value, 9) for value in values).most_common(1)  # equal but for rounding
    return len(values) - num_equal < FEWEST_OTHER_SCORES


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    means = torch.tensor(values, dtype=torch.float64)[_resamples(len(values))].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@functools.lru_cache(maxsize=8)
def _resamples(count: int) -> Tensor:
    """Indices [NUM_RESAMPLES, count] int64 that the bootstrap draws; the same for every metric of a set."""
    return torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def _interval(mean: float, low: float, high: float, method: str) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "interval": method}
