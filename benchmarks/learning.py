"""Training with gradient tolerances: `expo/recipes/laptop.yaml` with the model that `make smollm2` writes.

`python -m benchmarks.learning` trains with each tolerance and seed, and writes the curves to
`benchmarks/results/learning-cpu.json` after each run; runs that this file has are not repeated. `--table` writes the
table of docs/gradient-tolerance.md from it. Runs of one seed see the same questions in the same order.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.sampled_inputs import MODEL
from benchmarks.stamp import RESULTS, ROOT, stamp, write_results
from benchmarks.tables import replace_section

RECIPE = ROOT / "expo" / "recipes" / "laptop.yaml"
FILE = RESULTS / "learning-cpu.json"
PAGE = ROOT / "docs" / "gradient-tolerance.md"
BEGIN, END = "<!-- learning: made by python -m benchmarks.learning --table -->", "<!-- /learning -->"
TOLERANCES = (0.0, 1e-4, 1e-3)
SEEDS = (0, 1)
NUM_STEPS = 10
CURVES = ("accuracy", "kl", "entropy", "grad_norm", "kept_columns", "gradient_error_bound", "seconds/update")


def train(tolerance: float, seed: int, num_steps: int) -> dict[str, Any]:
    """One run: its settings, the curves of its steps, and the evaluations before and after it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = {
            "model.path": MODEL,
            "policy.gradient_tolerance": tolerance,
            "run.seed": seed,
            "run.steps": num_steps,
            "run.checkpoint_every": 0,
            "run.dir": run,
            "evaluation.every": 0,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        subprocess.run([sys.executable, "-m", "expo.train", RECIPE, *flags], cwd=ROOT, check=True)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    curves = {name: [step[name] for step in steps] for name in CURVES if name in steps[0]}
    evaluations = {when: summary[when]["held_out"]["pass_at"]["1"] for when in ("before", "after")}
    return {"tolerance": tolerance, "seed": seed, "curves": curves, **evaluations}


def measure(num_steps: int) -> None:
    """Trains what the file of results does not have yet."""
    results = json.loads(FILE.read_text()) if FILE.exists() else {"stamp": stamp(torch.device("cpu")), "runs": []}
    done = {(run["tolerance"], run["seed"]) for run in results["runs"]}
    for seed in SEEDS:
        for tolerance in TOLERANCES:
            if (tolerance, seed) not in done:
                print(f"tolerance {tolerance:g}, seed {seed}", flush=True)
                results["runs"].append(train(tolerance, seed, num_steps))
                write_results(FILE, results)


def table(runs: list[dict[str, Any]]) -> str:
    """One line per run: accuracy of its steps, held-out pass@1 with its 95 % interval, KL, columns and bound."""
    num_steps = len(runs[0]["curves"]["accuracy"])
    places = sorted({0, num_steps // 4, num_steps // 2, num_steps - 1})
    heads = ["seed", "tolerance", *(f"accuracy, step {place + 1}" for place in places), "last KL, nats"]
    heads += ["held-out pass@1 [95 %]", "mean columns", "largest bound"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---:' for _ in heads)} |"]
    for run in sorted(runs, key=lambda run: (run["seed"], run["tolerance"])):
        curves, after = run["curves"], run["after"]
        cells = [str(run["seed"]), f"{run['tolerance']:g}", *(f"{curves['accuracy'][place]:.3f}" for place in places)]
        cells += [f"{curves['kl'][-1]:.4f}", f"{after['mean']:.3f} [{after['low']:.3f}, {after['high']:.3f}]"]
        kept, bounds = curves.get("kept_columns", [1.0]), curves.get("gradient_error_bound", [0.0])
        cells += [f"{sum(kept) / len(kept):.1%}", f"{max(bounds):.1e}" if max(bounds) else "0"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains the runs that are missing, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--table", action="store_true", help=f"write the table of {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.table:
        replace_section(PAGE, BEGIN, END, table(json.loads(FILE.read_text())["runs"]))
    else:
        measure(arguments.steps)


if __name__ == "__main__":
    main()
