"""Short runs by the command line and their results: `python -m tests.golden.runs OUT.json`.

On one rank and on two: a run, and the same run killed after its first checkpoint and resumed; and one run with ZeRO 3.
The record of a run holds every tensor of the exported weights and the metrics of every step, except for timings.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.golden.digests import Record, digest, write
from tests.golden.trees import environment
from tests.ranks.running import kill_all, rows_of, write_questions

STEPS = 5
LEARNING_RATE = 2e-4
SETTINGS = {
    "run.steps": STEPS,
    "run.checkpoint_every": 2,
    "run.threads": 1,
    "rollout.questions_per_step": 4,
    "rollout.group_size": 4,
    "optimizer.warmup_steps": 1,
    "optimizer.lr": LEARNING_RATE,
    "policy.updates_per_step": 2,
    "evaluation.num_samples": 2,
}
METRICS = ("loss", "kl", "entropy", "accuracy", "beta_eff", "grad_norm")
PATIENCE_S = 300


class GoldenRun:
    """One run; the code of one tree may begin it and the code of another may resume it.

    Args:
        folder: folder of the run; its name identifies the run's processes, so no other name may begin with it.
        ranks: number of ranks.
        settings: settings in addition to `SETTINGS`.
    """

    def __init__(self, folder: Path, ranks: int = 1, **settings: Any) -> None:
        self.folder, self.ranks = folder, ranks
        folder.mkdir(parents=True)
        questions = write_questions(folder / "few.jsonl", [4, 5])
        values = {**SETTINGS, "evaluation.sets": f"{{few: {questions}}}", "run.dir": self.run}
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        self.arguments = [f"--{name}={value}" for name, value in values.items()]

    @property
    def run(self) -> Path:
        """The run's own folder."""
        return self.folder / "run"

    def finish(self, tree: Path, *, resume: bool = False) -> dict[str, Any]:
        """Train, or resume training, to the end with the code of `tree`; return the results of the run."""
        process = self._start(tree, *["--resume"] * resume)
        try:
            process.wait(timeout=PATIENCE_S)
        finally:
            kill_all(str(self.folder))
        if process.returncode != 0:
            raise RuntimeError(f"{self.folder.name} failed:\n{self._log.read_text()[-4000:]}")
        return self._facts()

    def kill_after_checkpoint(self, tree: Path) -> None:
        """Train with the code of `tree` until the first checkpoint exists, then kill every process of the run."""
        process = self._start(tree)
        expiry = time.monotonic() + PATIENCE_S
        try:
            while not self._has_checkpoint():
                if process.poll() is not None or time.monotonic() > expiry:
                    raise RuntimeError(f"{self.folder.name} made no checkpoint:\n{self._log.read_text()[-4000:]}")
                time.sleep(0.01)
        finally:
            kill_all(str(self.folder))
        process.wait()
        if (self.run / "summary.json").exists():
            raise RuntimeError(f"{self.folder.name} was over before it was killed; give it more steps")

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    def _start(self, tree: Path, *more: str) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = [sys.executable, *(launcher if self.ranks > 1 else []), "-m", "expo.train", *self.arguments, *more]
        marked = environment(tree, GOLDEN_RUN=str(self.folder), DS_ACCELERATOR="cpu")
        with self._log.open("w") as log:
            return subprocess.Popen(command, cwd=self.folder, env=marked, stdout=log, stderr=log, text=True)

    def _has_checkpoint(self) -> bool:
        checkpoints = self.run / "checkpoints"
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        return any(re.fullmatch(r"step-\d+", name) for name in names)

    def _facts(self) -> dict[str, Any]:
        rows = rows_of(self.run, "metrics")
        metrics = {f"step {row['step']}: {name}": ["float64", row[name]] for row in rows for name in METRICS}
        weights = load_file(self.run / "export" / "model.safetensors")
        return metrics | {name: digest(weights[name]) for name in sorted(weights)}


def record(tree: Path, folder: Path) -> Record:
    """Run all golden runs with the code of `tree`."""
    made: Record = {}
    for ranks, count in ((1, "one rank"), (2, "two ranks")):
        made[f"{count}: plain"] = GoldenRun(folder / f"plain-{ranks}", ranks).finish(tree)
        killed = GoldenRun(folder / f"killed-{ranks}", ranks)
        killed.kill_after_checkpoint(tree)
        made[f"{count}: killed and resumed"] = killed.finish(tree, resume=True)
    made["two ranks: ZeRO 3"] = GoldenRun(folder / "zero-3", 2, policy__zero_stage=3).finish(tree)
    return made


def resumed_unlike_plain(made: Record) -> list[str]:
    """One line for each number of a resumed run that differs from the uninterrupted run."""
    return [
        f"{count}: {name}: resumed {made[f'{count}: killed and resumed'].get(name)}, never killed {entry}"
        for count in ("one rank", "two ranks")
        for name, entry in made[f"{count}: plain"].items()
        if json.dumps(made[f"{count}: killed and resumed"].get(name)) != json.dumps(entry)
    ]


def out_of_reach(expected: Record, found: Record) -> list[str]:
    """One line for each weight that differs from the recorded one by more than training can change it.

    On another machine, a difference in a last bit may change a sampled token, and with it everything after it. On every
    machine, AdamW's first steps change no weight by more than the learning rate, since beta1 <= sqrt(beta2) here and
    there is no weight decay.
    """
    lines = []
    if list(expected) != list(found):
        return [f"runs are {list(found)}; the record has {list(expected)}"]
    for case, entries in expected.items():
        if list(entries) != list(found[case]):
            lines.append(f"{case}: names are {list(found[case])}; the record has {list(entries)}")
            continue
        for name, entry in entries.items():
            other = found[case][name]
            if isinstance(entry, list):
                continue
            reach = (
                2 * LEARNING_RATE * STEPS * SETTINGS["policy.updates_per_step"] * math.sqrt(math.prod(entry["shape"]))
            )
            alike = (entry["shape"], entry["dtype"]) == (other["shape"], other["dtype"])
            if not alike or abs(entry["l2"] - other["l2"]) > reach:
                lines.append(f"{case}: {name}: expected {entry} within {reach:.3g}, found {other}")
    return lines


def main(out: str) -> None:
    """Run all runs with the code of the current folder and write the record."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(out), record(Path.cwd(), Path(folder).resolve()))


if __name__ == "__main__":
    main(*sys.argv[1:])
