"""Tables and sentences of a plan, from the small results alone."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from expo.experiments.ablation.page import markdown
from expo.experiments.ablation.paired import holm
from expo.experiments.frontier.analysis import Interval, bootstrap, pass_at_k, spread_of, tokens_to_reach
from expo.experiments.frontier.plan import (
    BASELINE,
    HARDER,
    HELD_OUT,
    MATCHED,
    MATCHED_PAIR,
    PRIMARY_ARM,
    Plan,
    RunKey,
)

PRIMARY_K, KS = 32, (1, 8, 32, 128)
TARGET_HALF_WIDTH = 0.03
THRESHOLDS = (0.1, 0.2)  # of held-out pass@1, for the tokens to reach it
CONTRASTS = (
    (MATCHED_PAIR, MATCHED),
    (PRIMARY_ARM, MATCHED_PAIR),
    ("expo-counted", PRIMARY_ARM),
    ("expo-posterior", PRIMARY_ARM),
    ("expo-dynamic", "grpo-dynamic"),
)
"""Arms that are also compared with another arm than the baseline."""

Results = Mapping[RunKey, Mapping[str, Any]]


def report(plan: Plan, results: Results) -> str:
    """All tables of the finished runs as Markdown; the primary comparison stands only with all of its pairs."""
    settled = without_a_part_of_the_extension(plan, results)
    parts = [_provenance(plan, results), "Primary comparison:", primary_table(plan, settled), *sentences(plan, settled)]
    parts += ["Arms at the end, means over seeds:", arms_table(plan, settled)]
    parts += [f"Secondary differences to {BASELINE}, uncorrected:", secondary_table(plan, settled)]
    between = contrasts_table(plan, settled)
    if between:
        parts += ["Secondary differences between other arms, uncorrected:", between]
    parts += ["Means over the first ten steps and over the last ten, from the logs:", trajectory_table(plan, settled)]
    return "\n\n".join(parts) + "\n"


def without_a_part_of_the_extension(plan: Plan, results: Results) -> Results:
    """The results of the plan's own seeds, until all runs of the extension are finished: an interval may not decide
    when the seeds end."""
    extension = set(plan.keys(extended=True)) - set(plan.keys())
    if extension <= set(results):
        return results
    return {key: result for key, result in results.items() if key not in extension}


def paired_seeds(results: Results, arm: str, beta: float, baseline: str = BASELINE) -> list[int]:
    """Seeds of which an arm and the baseline have finished at one KL coefficient."""
    seeds = {key.seed for key in results if (key.arm, key.beta) == (arm, beta)}
    return sorted(seed for seed in seeds if RunKey(baseline, beta, seed) in results)


def differences(results: Results, arm: str, beta: float, name: str, k: int, baseline: str = BASELINE) -> Tensor:
    """pass@k of an arm less that of the baseline: [S, Q] float64, a row for each pair and a column for each question.

    `k` is lowered to n where fewer replies were sampled.
    """
    rows = []
    for seed in paired_seeds(results, arm, beta, baseline):
        both = [results[RunKey(each, beta, seed)] for each in (arm, baseline)]
        values = [_pass_at(found, name, k) for found in both]
        rows.append(values[0] - values[1])
    return torch.stack(rows)


def _pass_at(result: Mapping[str, Any], name: str, k: int) -> Tensor:
    n = result["num_replies"]
    return pass_at_k(torch.tensor(result["correct"][name]), n, min(k, n))


def primary(plan: Plan, results: Results) -> list[tuple[float, Interval, bool]]:
    """The KL coefficient, the difference in held-out pass@32 and whether it is significant after Holm's correction."""
    intervals = [
        bootstrap(differences(results, PRIMARY_ARM, beta, HELD_OUT, PRIMARY_K)) for beta in _complete(plan, results)
    ]
    significant = holm([interval.p for interval in intervals])
    if len(intervals) < len(plan.betas):  # a part of the family has no verdict
        significant = [False] * len(intervals)
    return list(zip(_complete(plan, results), intervals, significant, strict=True))


def _complete(plan: Plan, results: Results) -> list[float]:
    """The KL coefficients at which all pairs of the primary comparison have finished."""
    return [beta for beta in plan.betas if len(paired_seeds(results, PRIMARY_ARM, beta)) >= plan.seeds]


def primary_table(plan: Plan, results: Results) -> str:
    """The primary differences."""
    rows = [("beta", "pairs", "difference in pass@32", "95 % CI", "half-width", "p", "after Holm's correction")]
    for beta, found, is_significant in primary(plan, results):
        pairs = len(paired_seeds(results, PRIMARY_ARM, beta))
        verdict = "significant" if is_significant else "not significant"
        rows.append((f"{beta:g}", f"{pairs}", f"{found.mean:+.3f}", _interval(found), f"{found.half_width:.3f}",
                     f"{found.p:.4f}", verdict))  # fmt: skip
    return markdown(rows)


def sentences(plan: Plan, results: Results) -> list[str]:
    """One plain sentence for each primary difference, and one on its spread."""
    texts = []
    for beta, found, is_significant in primary(plan, results):
        spread = spread_of(differences(results, PRIMARY_ARM, beta, HELD_OUT, PRIMARY_K))
        verdict = (
            f"{PRIMARY_ARM} less {BASELINE} in held-out pass@32 at beta = {beta:g} is significant: {found.mean:+.3f}"
            if is_significant
            else f"no difference in held-out pass@32 was shown at beta = {beta:g}; the interval excludes gains above "
            f"{max(found.high, 0):.3f} and losses above {abs(min(found.low, 0)):.3f}"
        )
        more = ""
        if found.half_width > TARGET_HALF_WIDTH:
            is_extended = len(paired_seeds(results, PRIMARY_ARM, beta)) > plan.seeds
            due = "also with the further seeds" if is_extended else "so the further seeds are due (--extended)"
            more = f"; its half-width is above {TARGET_HALF_WIDTH}, {due}"
        texts.append(
            f"{verdict[0].upper()}{verdict[1:]}{more}. Its standard deviations: {spread.seeds:.3f} between seeds, "
            f"{spread.questions:.3f} between questions, {spread.rest:.3f} the rest."
        )
    return texts


def arms_table(plan: Plan, results: Results) -> str:
    """Means over seeds of every arm's measures."""
    shares = [f"reached {threshold:g}" for threshold in THRESHOLDS]
    rows = [("beta", "arm", "seeds", "steps", *(f"pass@{k}" for k in KS), f"{HARDER} pass@32", "no signal", "KL",
             "mean beta", *shares)]  # fmt: skip
    for beta in plan.betas:
        for arm in plan.arms:
            found = [result for key, result in sorted(results.items()) if (key.arm, key.beta) == (arm, beta)]
            if found:
                rows.append((f"{beta:g}", arm, f"{len(found)}", *_arm_cells(found)))
    return markdown(rows)


def _arm_cells(found: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(value: Any) -> float:
        return fmean(float(value(result)) for result in found)

    cells = [f"{mean(lambda result: result['steps']):.0f}"]
    cells += [f"{mean(lambda result, k=k: _pass_at(result, HELD_OUT, k).mean()):.3f}" for k in KS]
    cells.append(f"{mean(lambda result: _pass_at(result, HARDER, PRIMARY_K).mean()):.3f}")
    cells.append(f"{mean(lambda result: result['no_signal']):.2f}")
    cells += [f"{mean(lambda result, name=name: result[name]):.3f}" for name in ("kl_at_end", "mean_beta")]
    for threshold in THRESHOLDS:
        reached = [tokens_to_reach(result["curve"], threshold) for result in found]
        at = [tokens for tokens in reached if tokens is not None]
        cells.append(f"{len(at)} of {len(reached)}" + (f", at {fmean(at):,.0f} tokens" if at else ""))
    return cells


def secondary_table(plan: Plan, results: Results) -> str:
    """Differences of every arm to the baseline in every measure; none of them is corrected."""
    measures = [(HELD_OUT, k) for k in KS] + [(HARDER, 1), (HARDER, PRIMARY_K)]
    rows = [("beta", "arm", "pairs", *(f"{name} pass@{k}" for name, k in measures))]
    for beta in plan.betas:
        for arm in plan.arms:
            cells = _difference_cells(results, arm, BASELINE, beta, measures)
            if arm != BASELINE and cells:
                rows.append((f"{beta:g}", arm, *cells))
    return markdown(rows)


def contrasts_table(plan: Plan, results: Results) -> str:
    """Differences between two arms, for each of `CONTRASTS` with two pairs; empty if there is none."""
    rows = [("beta", "arm", "less", "pairs", *(f"{HELD_OUT} pass@{k}" for k in KS))]
    for beta in plan.betas:
        for arm, other in CONTRASTS:
            cells = _difference_cells(results, arm, other, beta, [(HELD_OUT, k) for k in KS])
            if cells:
                rows.append((f"{beta:g}", arm, other, *cells))
    return markdown(rows) if len(rows) > 1 else ""


def _difference_cells(
    results: Results, arm: str, baseline: str, beta: float, measures: Sequence[tuple[str, int]]
) -> list[str]:
    """The number of pairs, and for each measure the difference with its interval; empty below two pairs."""
    pairs = len(paired_seeds(results, arm, beta, baseline))
    if pairs < 2:
        return []
    found = [bootstrap(differences(results, arm, beta, name, k, baseline)) for name, k in measures]
    return [f"{pairs}", *(f"{each.mean:+.3f} {_interval(each)}" for each in found)]


TRAJECTORY = {
    "accuracy": "accuracy",
    "zero_variance_fraction": "groups without signal",
    "effective_sample_size": "effective number of questions",
    "beta_eff": "beta_eff",
    "kl": "KL",
    "entropy": "entropy",
}
"""Columns of the trajectory table by metric."""


def trajectory_table(plan: Plan, results: Results) -> str:
    """How the logged metrics of every arm moved, means over seeds."""
    rows = [("beta", "arm", *TRAJECTORY.values(), "beta_eff x KL")]
    for beta in plan.betas:
        for arm in plan.arms:
            found = [result["trajectory"] for key, result in results.items() if (key.arm, key.beta) == (arm, beta)]
            if found:
                ends = {name: [fmean(each[name][at] for each in found) for at in (0, -1)] for name in TRAJECTORY}
                penalty = [fmean(each["beta_eff"][at] * each["kl"][at] for each in found) for at in (0, -1)]
                cells = [f"{first:.3g} to {last:.3g}" for first, last in (*ends.values(), penalty)]
                rows.append((f"{beta:g}", arm, *cells))
    return markdown(rows)


def _interval(found: Interval) -> str:
    return f"[{found.low:+.3f}, {found.high:+.3f}]"


def _provenance(plan: Plan, results: Results) -> str:
    total = len(plan.keys(extended=any(key.seed >= plan.seeds for key in results)))
    commits = sorted({str(result["commit"]) for result in results.values()})
    versions = sorted({str(result["torch"]) for result in results.values()})
    return (
        f"{len(results)} of {total} runs of the plan {plan.name} are finished; {plan.reply_tokens:,} reply tokens "
        f"each, {plan.num_replies} replies to each held-out question; torch {', '.join(versions)}; commits "
        f"{', '.join(commits)}."
    )
