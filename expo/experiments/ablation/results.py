"""What the runs showed: scores by arm and pool, paired differences between arms, and which are beyond noise."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from expo.experiments.ablation.paired import Difference, Mean, holm, mean_over_seeds, paired_difference
from expo.experiments.ablation.plan import ADDED, BASELINE, EVALUATED, Run
from expo.reporting.comparison import pass_at

CURVE_POINTS = 9  # places along the budget at which curves of several runs are averaged

Curve = list[tuple[float, float, float]]  # reply tokens, mean over seeds, its standard error


class Point(NamedTuple):
    """One evaluation: reply tokens sampled until then, and mean pass@k over the held-out questions."""

    step: int
    reply_tokens: int
    pass_at_1: float
    pass_at_8: float


@dataclass(frozen=True)
class Outcome:
    """One finished run: its curve, from before the first step to after the last, and what it took."""

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
"""What runs are compared by. The mean of the run is steadier than its last point."""


@dataclass(frozen=True)
class Contrast:
    """An arm's paired difference to another on one pool by one measure."""

    pool: str
    arm: str
    less: str
    """The arm that is taken off."""
    measure: str
    difference: Difference
    is_beyond_noise: bool
    """By Holm's correction for all contrasts of its family."""


def read_outcome(run: Run) -> Outcome:
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
    """Those of a run; in older records, which name the last alone, that one."""
    return tuple(record["commits"]) if "commits" in record else (record["commit"],)


def _point(row: Mapping[str, Any]) -> Point:
    first, eighth = (pass_at(row["sets"][EVALUATED], k) for k in (1, 8))
    assert first is not None
    assert eighth is not None
    return Point(row["step"], row["reply_tokens"], first.mean, eighth.mean)


def curve_mean(curve: Sequence[Point]) -> float:
    """Mean pass@1 over the reply tokens of a run, straight lines between evaluations."""
    areas = (
        (right.reply_tokens - left.reply_tokens) * (left.pass_at_1 + right.pass_at_1) / 2
        for left, right in pairwise(curve)
    )
    return sum(areas) / curve[-1].reply_tokens


def pass_at_1_after(curve: Sequence[Point], reply_tokens: float) -> float:
    """pass@1 when so many tokens had been sampled, straight lines between evaluations."""
    for left, right in pairwise(curve):
        if reply_tokens <= right.reply_tokens:
            share = (reply_tokens - left.reply_tokens) / (right.reply_tokens - left.reply_tokens)
            return left.pass_at_1 + share * (right.pass_at_1 - left.pass_at_1)
    return curve[-1].pass_at_1


def of_arm(outcomes: Sequence[Outcome], pool: str, arm: str) -> list[Outcome]:
    """The outcomes of one arm on one pool, by seed."""
    chosen = [outcome for outcome in outcomes if (outcome.pool, outcome.arm) == (pool, arm)]
    return sorted(chosen, key=lambda outcome: outcome.seed)


def names(outcomes: Sequence[Outcome], field: str) -> list[str]:
    """Pools or arms in the order in which they were planned."""
    return list(dict.fromkeys(getattr(outcome, field) for outcome in outcomes))


def scores(outcomes: Sequence[Outcome], pool: str, arm: str, measure: str) -> Mean:
    """One measure of one arm on one pool, over seeds."""
    return mean_over_seeds([MEASURES[measure](outcome) for outcome in of_arm(outcomes, pool, arm)])


def contrasts(outcomes: Sequence[Outcome]) -> list[Contrast]:
    """The primary family, fixed before the first result: every arm less the baseline, on every pool, by every measure.

    Its correction knows of no other family.
    """
    return _family(outcomes, [(arm, BASELINE) for arm in names(outcomes, "arm") if arm != BASELINE])


def secondary_contrasts(outcomes: Sequence[Outcome]) -> list[Contrast]:
    """What the counted estimate adds to EXPO (`plan.ADDED`), corrected apart; none where one of the two did not run."""
    return _family(outcomes, [ADDED] if set(ADDED) <= set(names(outcomes, "arm")) else [])


def _family(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
    keys, differences = [], []
    for pool in names(outcomes, "pool"):
        for arm, less in pairs:
            for measure, value in MEASURES.items():
                arms = (of_arm(outcomes, pool, name) for name in (arm, less))
                keys.append((pool, arm, less, measure))
                differences.append(paired_difference(*([value(outcome) for outcome in each] for each in arms)))
    beyond = holm([difference.p for difference in differences])
    return [Contrast(*key, found, is_beyond) for key, found, is_beyond in zip(keys, differences, beyond, strict=True)]


def curves(outcomes: Sequence[Outcome], budget: int, *, is_paired: bool) -> dict[str, dict[str, Curve]]:
    """Mean pass@1 along the budget by pool and arm, or its paired difference to the baseline, whose own is 0."""
    places = [budget * index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
    found: dict[str, dict[str, Curve]] = {}
    for pool in names(outcomes, "pool"):
        lines = {
            arm: [[pass_at_1_after(each.curve, place) for each in of_arm(outcomes, pool, arm)] for place in places]
            for arm in names(outcomes, "arm")
        }
        base = lines[BASELINE]
        if is_paired:
            lines = {arm: _minus(line, base) for arm, line in lines.items()}
        found[pool] = {
            arm: [(place, *mean_over_seeds(values)) for place, values in zip(places, line, strict=True)]
            for arm, line in lines.items()
        }
    return found


def _minus(line: list[list[float]], base: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(*values, strict=True)] for values in zip(line, base, strict=True)]


def as_record(
    outcomes: Sequence[Outcome], settings: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """All of it for results.json, named."""
    return {
        "commits": sorted({str(commit) for outcome in outcomes for commit in outcome.commits}),
        "environment": environment,
        "settings": settings,
        "contrasts": [_named(contrast) for contrast in contrasts(outcomes)],
        "secondary_contrasts": [_named(contrast) for contrast in secondary_contrasts(outcomes)],
        "runs": [{**asdict(outcome), "curve": [point._asdict() for point in outcome.curve]} for outcome in outcomes],
    }


def _named(contrast: Contrast) -> dict[str, Any]:
    return {**asdict(contrast), "difference": contrast.difference._asdict()}


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
