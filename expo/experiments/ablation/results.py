"""Results of the runs: scores by arm and pool, paired differences between arms, and which are significant."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from expo.experiments.ablation.paired import Difference, Mean, holm, mean_over_seeds, paired_difference
from expo.experiments.ablation.plan import BASELINE, EVALUATED, SECONDARY, PlannedRun
from expo.reporting.comparison import pass_at

CURVE_POINTS = 9  # points along the token budget at which curves are averaged over seeds

Curve = list[tuple[float, float, float]]  # reply tokens, mean over seeds, standard error of the mean


class Point(NamedTuple):
    """One evaluation: reply tokens sampled so far, and mean pass@k over the held-out questions."""

    step: int
    reply_tokens: int
    pass_at_1: float
    pass_at_8: float


@dataclass(frozen=True)
class Outcome:
    """One finished run: its evaluations from before the first step to after the last, its steps, tokens and seconds."""

    pool: str
    arm: str
    seed: int
    steps: int
    reply_tokens: int
    seconds: float
    commits: tuple[str | None, ...]
    curve: tuple[Point, ...]


MEASURES: dict[str, Callable[[Outcome], float]] = {
    "pass@1, mean of the run": lambda outcome: curve_mean(outcome.curve),
    "pass@1, at the end": lambda outcome: outcome.curve[-1].pass_at_1,
    "pass@8, at the end": lambda outcome: outcome.curve[-1].pass_at_8,
}
"""The measures that are compared, by name. The mean over a run has less variance than its last evaluation."""


@dataclass(frozen=True)
class Contrast:
    """The paired difference between an arm and a reference arm on one pool for one measure."""

    pool: str
    arm: str
    reference: str
    """The arm that is subtracted."""
    measure: str
    difference: Difference
    is_significant: bool
    """After Holm's correction for all contrasts of its family."""


def read_outcome(run: PlannedRun) -> Outcome:
    """The outcome of a finished run."""
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    lines = (run.folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(
        run.pool,
        run.arm,
        run.seed,
        summary["steps"],
        summary["reply_tokens"],
        summary["seconds"],
        _commits(summary),
        tuple(_point(json.loads(line)) for line in lines),
    )


def _commits(record: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The commits that a run used; older records contain only the last one."""
    return tuple(record["commits"]) if "commits" in record else (record["commit"],)


def _point(row: Mapping[str, Any]) -> Point:
    first, eighth = (pass_at(row["sets"][EVALUATED], k) for k in (1, 8))
    assert first is not None
    assert eighth is not None
    return Point(row["step"], row["reply_tokens"], first.mean, eighth.mean)


def curve_mean(curve: Sequence[Point]) -> float:
    """Mean pass@1 over the reply tokens of a run, interpolated linearly between evaluations."""
    areas = (
        (right.reply_tokens - left.reply_tokens) * (left.pass_at_1 + right.pass_at_1) / 2
        for left, right in pairwise(curve)
    )
    return sum(areas) / curve[-1].reply_tokens


def pass_at_1_after(curve: Sequence[Point], reply_tokens: float) -> float:
    """pass@1 after `reply_tokens` sampled tokens, interpolated linearly between evaluations."""
    for left, right in pairwise(curve):
        if reply_tokens <= right.reply_tokens:
            fraction = (reply_tokens - left.reply_tokens) / (right.reply_tokens - left.reply_tokens)
            return left.pass_at_1 + fraction * (right.pass_at_1 - left.pass_at_1)
    return curve[-1].pass_at_1


def of_arm(outcomes: Sequence[Outcome], pool: str, arm: str) -> list[Outcome]:
    """The outcomes of one arm on one pool, ordered by seed."""
    selected = [outcome for outcome in outcomes if (outcome.pool, outcome.arm) == (pool, arm)]
    return sorted(selected, key=lambda outcome: outcome.seed)


def names(outcomes: Sequence[Outcome], field: str) -> list[str]:
    """Pools or arms (`field`) in the order of the plan."""
    return list(dict.fromkeys(getattr(outcome, field) for outcome in outcomes))


def scores(outcomes: Sequence[Outcome], pool: str, arm: str, measure: str) -> Mean:
    """Mean over seeds of one measure of one arm on one pool."""
    return mean_over_seeds([MEASURES[measure](outcome) for outcome in of_arm(outcomes, pool, arm)])


def contrasts(outcomes: Sequence[Outcome]) -> list[Contrast]:
    """The primary family, fixed before the first result: every arm minus the baseline, for every pool and measure.

    Its correction ignores the secondary family.
    """
    return _family(outcomes, [(arm, BASELINE) for arm in names(outcomes, "arm") if arm != BASELINE])


def secondary_contrasts(outcomes: Sequence[Outcome]) -> list[Contrast]:
    """The comparison `plan.SECONDARY`, corrected separately; empty if one of its arms did not run."""
    return _family(outcomes, [SECONDARY] if set(SECONDARY) <= set(names(outcomes, "arm")) else [])


def _family(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
    keys, differences = [], []
    for pool in names(outcomes, "pool"):
        for arm, reference in pairs:
            for measure, value in MEASURES.items():
                arms = (of_arm(outcomes, pool, name) for name in (arm, reference))
                keys.append((pool, arm, reference, measure))
                differences.append(paired_difference(*([value(outcome) for outcome in each] for each in arms)))
    significant = holm([difference.p for difference in differences])
    tests = zip(keys, differences, significant, strict=True)
    return [Contrast(*key, difference, is_significant) for key, difference, is_significant in tests]


def curves(outcomes: Sequence[Outcome], budget: int, *, is_paired: bool) -> dict[str, dict[str, Curve]]:
    """Mean pass@1 along the token budget by pool and arm; if `is_paired`, its paired difference to the baseline."""
    grid = [budget * index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
    curves_by_pool: dict[str, dict[str, Curve]] = {}
    for pool in names(outcomes, "pool"):
        lines = {
            arm: [
                [pass_at_1_after(outcome.curve, tokens) for outcome in of_arm(outcomes, pool, arm)] for tokens in grid
            ]
            for arm in names(outcomes, "arm")
        }
        base = lines[BASELINE]
        if is_paired:
            lines = {arm: _subtract(line, base) for arm, line in lines.items()}
        curves_by_pool[pool] = {
            arm: [(tokens, *mean_over_seeds(values)) for tokens, values in zip(grid, line, strict=True)]
            for arm, line in lines.items()
        }
    return curves_by_pool


def _subtract(line: list[list[float]], base: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(*values, strict=True)] for values in zip(line, base, strict=True)]


def as_record(
    outcomes: Sequence[Outcome], settings: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of results.json."""
    return {
        "commits": sorted({str(commit) for outcome in outcomes for commit in outcome.commits}),
        "environment": environment,
        "settings": settings,
        "contrasts": [_as_dict(contrast) for contrast in contrasts(outcomes)],
        "secondary_contrasts": [_as_dict(contrast) for contrast in secondary_contrasts(outcomes)],
        "runs": [{**asdict(outcome), "curve": [point._asdict() for point in outcome.curve]} for outcome in outcomes],
    }


def _as_dict(contrast: Contrast) -> dict[str, Any]:
    return {  # the keys of the file format, which is older than the names of the fields
        "pool": contrast.pool,
        "arm": contrast.arm,
        "less": contrast.reference,
        "measure": contrast.measure,
        "difference": contrast.difference._asdict(),
        "is_beyond_noise": contrast.is_significant,
    }


def from_record(record: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes in a results.json."""
    return [
        Outcome(
            **{name: value for name, value in run.items() if name not in ("commit", "commits", "curve")},
            commits=_commits(run),
            curve=tuple(Point(**point) for point in run["curve"]),
        )
        for run in record["runs"]
    ]
