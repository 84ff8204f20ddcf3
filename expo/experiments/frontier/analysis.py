"""Statistics of a plan: unbiased pass@k, a bootstrap over seeds and questions, Holm's correction, and power.

Letters: S pairs of runs of the same seed, Q questions, n replies to each, c of them correct.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from expo.experiments.ablation.paired import LEVEL

RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_605_403


class Interval(NamedTuple):
    """A mean difference with its 95 % interval and two-sided p value, before any correction."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


def pass_at_k(correct: Tensor, n: int, k: int) -> Tensor:
    """Unbiased pass@k of every question from c of [..., Q] int64, as float64.

    Source: Chen et al., arXiv 2107.03374, eq. 1: 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}; expected 1 to n = {n}")
    table = torch.tensor([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)], dtype=torch.float64)
    return table[correct]


def bootstrap(differences: Tensor, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED) -> Interval:
    """The mean of differences [S, Q] with a percentile interval: seeds and questions are both drawn anew.

    Both are samples of what the claim is about, so both are clusters: a resample takes S rows and Q columns with
    replacement, independently of each other. p is twice the smaller share of resampled means on either side of 0.

    Source: Owen 2007 (Annals of Applied Statistics 1:386), the pigeonhole bootstrap of crossed random effects; its
    variance is not below the true one.
    """
    generator = torch.Generator().manual_seed(seed)
    num_seeds, num_questions = differences.shape
    rows = _multiplicities(resamples, num_seeds, generator)
    columns = _multiplicities(resamples, num_questions, generator)
    means = ((rows @ differences.double()) * columns).sum(dim=1) / (num_seeds * num_questions)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    least = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Interval(float(differences.double().mean()), low, high, min(1.0, 2 * (least + 1) / (resamples + 1)))


def _multiplicities(resamples: int, size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` items is drawn in each resample: [resamples, size] float64, rows sum to `size`."""
    drawn = torch.randint(size, (resamples, size), generator=generator)
    return torch.zeros(resamples, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, size, dtype=torch.float64)
    )


class Spread(NamedTuple):
    """Standard deviations of a difference in pass@k: of its true mean between seeds, of its true mean between
    questions, and of the rest, which differs by seed and question (the noise of n replies included)."""

    seeds: float
    questions: float
    rest: float


def standard_error(spread: Spread, num_seeds: int, num_questions: int) -> float:
    """Of the mean difference of S seeds and Q questions, as the bootstrap estimates it: it counts the rest threefold
    (Owen 2007, theorem 3)."""
    return math.sqrt(
        spread.seeds**2 / num_seeds
        + spread.questions**2 / num_questions
        + 3 * spread.rest**2 / (num_seeds * num_questions)
    )


def detectable(error: float, num_tests: int, power: float = 0.8) -> float:
    """The difference that is significant with probability `power` in a two-sided test at 5 % divided by `num_tests`:
    Holm's first step, and so a bound for all of its steps."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - (1 - LEVEL) / (2 * num_tests)) + normal.inv_cdf(power)) * error


def spread_of(differences: Tensor) -> Spread:
    """Estimates a `Spread` from differences [S, Q] by the mean squares of a two-way layout without replication."""
    num_seeds, num_questions = differences.shape
    values = differences.double()
    rows, columns, mean = values.mean(dim=1), values.mean(dim=0), values.mean()
    rest = values - rows[:, None] - columns[None, :] + mean
    rest_square = float((rest**2).sum()) / ((num_seeds - 1) * (num_questions - 1))
    between_seeds = float(rows.var()) - rest_square / num_questions
    between_questions = float(columns.var()) - rest_square / num_seeds
    return Spread(*(math.sqrt(max(value, 0.0)) for value in (between_seeds, between_questions, rest_square)))


def tokens_to_reach(curve: Sequence[Sequence[float]], threshold: float) -> float | None:
    """Reply tokens at which pass@1 first reaches `threshold`, interpolated linearly between evaluations; None if it
    does not.

    Args:
        curve: step, reply tokens and pass@1 of each evaluation.
        threshold: of pass@1.
    """
    previous = None
    for _, tokens, value in curve:
        if value >= threshold:
            if previous is None:
                return float(tokens)
            before, low = previous
            return float(before + (tokens - before) * (threshold - low) / (value - low))
        previous = (tokens, value)
    return None
