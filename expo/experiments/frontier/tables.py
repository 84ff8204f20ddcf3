"""Tables and sentences of a plan, from the small results alone."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from expo.experiments.ablation.page import markdown
from expo.experiments.ablation.paired import holm
from expo.experiments.frontier.analysis import Interval, bootstrap, pass_at_k, spread_of, tokens_to_reach
from expo.experiments.frontier.plan import BASELINE, HARDER, HELD_OUT, PRIMARY_ARM, Plan, RunKey

PRIMARY_K, SECONDARY_KS = 32, (1, 8, 128)
TARGET_HALF_WIDTH = 0.03
THRESHOLDS = (0.1, 0.2)  # of held-out pass@1, for the tokens to reach it

Results = Mapping[RunKey, Mapping[str, Any]]


def report(plan: Plan, results: Results) -> str:
    """All tables of the finished runs as Markdown; the primary comparison stands only with all of its pairs."""
    parts = [_provenance(plan, results), "Primary comparison:", primary_table(plan, results), *sentences(plan, results)]
    parts += ["Arms at the end, means over seeds:", arms_table(plan, results)]
    parts += ["Secondary differences to grpo, uncorrected:", secondary_table(plan, results)]
    return "\n\n".join(parts) + "\n"


def paired_seeds(results: Results, arm: str, beta: float) -> list[int]:
    """Seeds of which an arm and the baseline have finished at one KL coefficient."""
    seeds = {key.seed for key in results if (key.arm, key.beta) == (arm, beta)}
    return sorted(seed for seed in seeds if RunKey(BASELINE, beta, seed) in results)


def differences(results: Results, arm: str, beta: float, name: str, k: int) -> Tensor:
    """pass@k of an arm less that of the baseline: [S, Q] float64, a row for each pair and a column for each question.

    `k` is lowered to n where fewer replies were sampled.
    """
    rows = []
    for seed in paired_seeds(results, arm, beta):
        both = [results[RunKey(each, beta, seed)] for each in (arm, BASELINE)]
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
        wide = found.half_width > TARGET_HALF_WIDTH
        more = (
            f"; its half-width is above {TARGET_HALF_WIDTH}, so the further seeds are due (--extended)" if wide else ""
        )
        texts.append(
            f"{verdict[0].upper()}{verdict[1:]}{more}. Its standard deviations: {spread.seeds:.3f} between seeds, "
            f"{spread.questions:.3f} between questions, {spread.rest:.3f} the rest."
        )
    return texts


def arms_table(plan: Plan, results: Results) -> str:
    """Means over seeds of every arm's measures."""
    shares = [f"reached {threshold:g}" for threshold in THRESHOLDS]
    ks = (*sorted({PRIMARY_K, *SECONDARY_KS}),)
    rows = [("beta", "arm", "seeds", "steps", *(f"pass@{k}" for k in ks), f"{HARDER} pass@32", "no signal", "KL",
             "mean beta", *shares)]  # fmt: skip
    for beta in plan.betas:
        for arm in plan.arms:
            found = [result for key, result in sorted(results.items()) if (key.arm, key.beta) == (arm, beta)]
            if found:
                rows.append((f"{beta:g}", arm, f"{len(found)}", *_arm_cells(found, ks)))
    return markdown(rows)


def _arm_cells(found: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> list[str]:
    def mean(value: Any) -> float:
        return fmean(float(value(result)) for result in found)

    cells = [f"{mean(lambda result: result['steps']):.0f}"]
    cells += [f"{mean(lambda result, k=k: _pass_at(result, HELD_OUT, k).mean()):.3f}" for k in ks]
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
    measures = [(HELD_OUT, k) for k in sorted({PRIMARY_K, *SECONDARY_KS})] + [(HARDER, 1), (HARDER, PRIMARY_K)]
    rows = [("beta", "arm", "pairs", *(f"{name} pass@{k}" for name, k in measures))]
    for beta in plan.betas:
        for arm in plan.arms:
            pairs = len(paired_seeds(results, arm, beta))
            if arm == BASELINE or pairs < 2:
                continue
            found = [bootstrap(differences(results, arm, beta, name, k)) for name, k in measures]
            rows.append((f"{beta:g}", arm, f"{pairs}", *(f"{each.mean:+.3f} {_interval(each)}" for each in found)))
    return markdown(rows)


def _interval(found: Interval) -> str:
    return f"[{found.low:+.3f}, {found.high:+.3f}]"


def _provenance(plan: Plan, results: Results) -> str:
    total = len(plan.keys())
    commits = sorted({str(result["commit"]) for result in results.values()})
    versions = sorted({str(result["torch"]) for result in results.values()})
    return (
        f"{len(results)} of {total} runs of the plan {plan.name} are finished; {plan.reply_tokens:,} reply tokens "
        f"each, {plan.num_replies} replies to each held-out question; torch {', '.join(versions)}; commits "
        f"{', '.join(commits)}."
    )
