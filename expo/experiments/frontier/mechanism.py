"""What curriculum sampling had to work with in the runs of a plan: `python -m expo.experiments.frontier.mechanism`.

For every finished run whose folder is there, the trained model answers the questions of its training pool.
These exact pass rates are compared with the estimates that the run ended with, and so are the sampling weights of both.
It writes mechanism.json beside the results, and prints the table of docs/curriculum.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from expo.config import RunConfig
from expo.experiments.ablation.page import markdown
from expo.experiments.frontier.counts import count_correct
from expo.experiments.frontier.plan import BASELINE, FRONTIER, PLANS, PRIMARY_ARM, Plan
from expo.experiments.frontier.run import FrontierRun
from expo.run.lifecycle import SUMMARY
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.console import Display
from expo_kernels import CurriculumTable

PROGRAM = "python -m expo.experiments.frontier.mechanism"
LAST_STEPS = 20  # that logged values are averaged over


def without_signal(rates: Tensor, weights: Tensor, group_size: int) -> float:
    """The expected share of groups whose replies are all right or all wrong.

    Args:
        rates: [Q] in [0, 1], the pass rate of each question.
        weights: [Q] >= 0, in proportion to which questions are drawn.
        group_size: replies to a question.
    """
    all_alike = rates**group_size + (1 - rates) ** group_size
    return float((weights * all_alike).sum() / weights.sum())


def measure(run: FrontierRun, num_replies: int) -> dict[str, float]:
    """Logged values at the end of a run, and what they would be with the exact pass rates of the trained model."""
    config, training = run.config(), run.folder / "training"
    counts = count_correct(training / "export", config, run.plan.train(run.key.seed), num_replies)
    rates = torch.tensor(counts.correct) / num_replies
    found = {"pass_rate": float(rates.mean()), **_logged(training), **with_exact_rates(rates, config)}
    return {name: round(value, 4) for name, value in found.items()}


def with_exact_rates(rates: Tensor, config: RunConfig) -> dict[str, float]:
    """What Gaussian curriculum sampling would do if its estimates were these pass rates, [Q]."""
    section, group_size = config.curriculum, config.rollout.group_size
    curriculum = CurriculumTable(len(rates), mean=section.mean, std=section.std, momentum=0.0)
    curriculum.update(torch.arange(len(rates)), rates)
    return {
        "exact_effective_share": float(curriculum.effective_sample_size) / len(rates),
        "exact_no_signal": without_signal(rates, curriculum.weights, group_size),
        "uniform_no_signal": without_signal(rates, torch.ones_like(rates), group_size),
    }


def _logged(training: Path) -> dict[str, float]:
    """Means over the last steps; the estimated pass rates are read from the middles of the histogram's bins."""
    metrics = _last_rows(training / "metrics.jsonl")
    found = {
        "no_signal": fmean(row["zero_variance_fraction"] for row in metrics),
        "penalty": fmean(row["beta_eff"] * row["kl"] for row in metrics),
        "beta_eff": fmean(row["beta_eff"] for row in metrics),
    }
    path = training / "curriculum.jsonl"
    if path.exists():
        last = _last_rows(path)[-1]
        bins = last["histogram"]
        found["estimate"] = sum(count * (i + 0.5) / len(bins) for i, count in enumerate(bins)) / sum(bins)
        found["effective_share"] = last["effective_sample_size"] / last["num_questions"]
    return found


def _last_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-LAST_STEPS:]]


COLUMNS = {
    "pass_rate": "pass rate of the pool",
    "estimate": "mean estimate",
    "effective_share": "effective share",
    "exact_effective_share": "with exact rates",
    "no_signal": "groups without signal",
    "exact_no_signal": "with exact rates",
    "uniform_no_signal": "with uniform draws",
    "beta_eff": "beta_eff",
    "penalty": "beta_eff x KL",
}
"""Columns of the table by measure."""


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over the runs of each KL coefficient and arm, as Markdown."""
    rows = [("beta", "arm", "runs", *COLUMNS.values())]
    for beta, arm in sorted({(row["beta"], row["arm"]) for row in found.values()}):
        runs = [row for row in found.values() if (row["beta"], row["arm"]) == (beta, arm)]
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in runs if name in row]
            cells.append(f"{fmean(values):.4f}" if values and name == "penalty" else _rounded(values))
        rows.append((f"{beta:g}", arm, f"{len(runs)}", *cells))
    return markdown(rows)


def _rounded(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure the curriculum of a plan's runs.")
    parser.add_argument("--plan", choices=PLANS, default=FRONTIER.name, help="which plan")
    parser.add_argument("--arms", nargs="+", default=[BASELINE, PRIMARY_ARM], metavar="ARM")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), metavar="DIR", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/frontier"), metavar="DIR")
    parser.add_argument("--num-replies", type=int, default=256, metavar="N", help="to each question of a pool")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    path, display = options.results / "mechanism.json", Display()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    plan: Plan = PLANS[options.plan]
    keys = [key for key in plan.keys(extended=True) if key.arm in options.arms]
    for run in (FrontierRun(plan, key, options.out, options.results) for key in keys):
        has_model = (run.folder / "training" / SUMMARY).exists()
        if run.name not in found and has_model and run.is_ready and run.is_finished:
            display.line(run.name)
            kind = {"arm": run.key.arm, "beta": run.key.beta, "settings_sha256": run.digest}
            found[run.name] = {**kind, "num_replies": options.num_replies, **measure(run, options.num_replies)}
            write_bytes_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    display.line(table(found) if found else f"no finished run of {plan.name} is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
