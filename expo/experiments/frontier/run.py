"""One run of a plan: `python -m expo.experiments.frontier.run PLAN ARM BETA SEED OUT RESULTS`.

It trains, or resumes training, in a folder of OUT; samples n replies to every held-out question; and writes the small
result of the run, whole or not at all, into RESULTS. A run whose result is there is finished, on whichever machine.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.config import RunConfig, parse_command_line
from expo.errors import AblationError, ConfigError
from expo.experiments.frontier.counts import Counts, count_correct
from expo.experiments.frontier.plan import HELD_OUT, PLANS, Plan, RunKey, as_json_lines, settings_digest
from expo.experiments.frontier.warm_starts import warm_start_folder, weights_sha256
from expo.ledger import MODEL_PATH
from expo.reporting.comparison import pass_at
from expo.run.environment import describe_environment
from expo.run.lifecycle import SUMMARY
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.distributed import leave_ranks
from expo.runtime.endings import errors_on_one_line, run_and_exit
from expo.train import train

PROGRAM = "python -m expo.experiments.frontier.run"
FORMAT = 1  # of a result
TRAJECTORY_STEPS = 10  # steps averaged into one point
TRAJECTORY = ("accuracy", "beta_eff", "kl", "entropy", "zero_variance_fraction", "effective_sample_size")


@dataclass(frozen=True)
class FrontierRun:
    """A run with its folders; a job of `expo.experiments.ablation.runs`."""

    plan: Plan
    key: RunKey
    out: Path
    results: Path

    @property
    def name(self) -> str:
        """Arm, KL coefficient and seed as text."""
        return self.key.name

    @property
    def folder(self) -> Path:
        """The folder of training."""
        return self.out / "runs" / self.key.file_name

    @property
    def result_path(self) -> Path:
        """The file of the small result."""
        return self.results / "runs" / f"{self.key.file_name}.json"

    @property
    def model(self) -> Path:
        """The folder of the initial model."""
        return warm_start_folder(self.results, self.plan.warm_start(self.key.seed))

    @property
    def pair(self) -> "FrontierRun | None":
        """The run that gives this one its KL coefficient."""
        key = self.key.pair
        return None if key is None else FrontierRun(self.plan, key, self.out, self.results)

    @property
    def is_ready(self) -> bool:
        """Whether its initial model is there, and the run that gives its KL coefficient is finished."""
        return self.model.exists() and (self.pair is None or self.pair.is_finished)

    @property
    def is_finished(self) -> bool:
        """Whether its result is there.

        Raises: ConfigError if that is the result of other settings.
        """
        return self.result_path.exists() and bool(self.result())

    @property
    def beta(self) -> float:
        """The KL coefficient of the run: the key's, or the mean one of its pair."""
        return self.key.beta if self.pair is None else float(self.pair.result()["mean_beta"])

    @property
    def digest(self) -> str:
        """SHA-256 of the settings."""
        return settings_digest(self.plan, self.key, self.beta, weights_sha256(self.model))

    def result(self) -> dict[str, Any]:
        """The small result.

        Raises: ConfigError if it is damaged, or the result of other settings.
        """
        try:
            found: dict[str, Any] = json.loads(self.result_path.read_text(encoding="utf-8"))
            saved = found["settings_sha256"]
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.result_path} cannot be read ({error}); restore it, or delete it") from error
        if saved != self.digest:
            raise ConfigError(
                f"{self.result_path} is the result of other settings, questions or initial weights (settings_sha256 "
                f"{saved[:12]}, expected {self.digest[:12]}); restore those of the plan, or give another --results"
            )
        return found

    def command(self) -> list[str]:
        """The command of the run."""
        key = self.key
        places = [str(self.out), str(self.results)]
        return [sys.executable, "-m", "expo.experiments.frontier.run", self.plan.name, key.arm, repr(key.beta),
                str(key.seed), *places]  # fmt: skip

    def config(self) -> RunConfig:
        """The configuration of training; writes the question files.

        Raises: ConfigError if the folder was trained with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        marker, digest = self.folder / "settings_sha256", self.digest
        if marker.exists() and marker.read_text(encoding="utf-8") != digest:
            raise ConfigError(f"{self.folder} was trained with other settings; give another --out, or delete it")
        write_bytes_whole(marker, digest.encode())
        train_path, held_out = self.folder / "train.jsonl", self.folder / "held_out.jsonl"
        write_bytes_whole(train_path, as_json_lines(self.plan.train(self.key.seed)).encode())
        write_bytes_whole(held_out, as_json_lines(self.plan.sets[HELD_OUT]()).encode())
        paths = (
            f"--run.dir={self.folder / 'training'}",
            f"--data.train={train_path}",
            f"--evaluation.sets={{{HELD_OUT}: {json.dumps(str(held_out))}}}",
            f"--model.path={'ledger' if self.model == MODEL_PATH else self.model}",
        )
        return parse_command_line([*self.plan.run_flags(self.key, self.beta), *paths], PROGRAM).config


def execute(run: FrontierRun) -> bool:
    """Trains, counts and writes the result; False if training was asked to stop."""
    started = time.process_time()
    config = run.config()
    training = config.run.dir
    assert training is not None
    if not (training / SUMMARY).exists():
        train(config, resume=True)
    if not (training / SUMMARY).exists():
        return False
    trained = time.process_time()
    sets = {name: draw() for name, draw in run.plan.sets.items()}
    counts = {
        name: count_correct(training / "export", config, questions, run.plan.num_replies)
        for name, questions in sets.items()
    }
    seconds = {"training": trained - started, "counting": time.process_time() - trained}
    result = _result(run, training, counts, seconds)
    run.result_path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(run.result_path, (json.dumps(result, separators=(",", ":")) + "\n").encode())
    for name in ("checkpoints", "rollouts"):
        shutil.rmtree(training / name, ignore_errors=True)
    return True


def _result(run: FrontierRun, training: Path, counts: dict[str, Counts], seconds: dict[str, float]) -> dict[str, Any]:
    rows = _rows(training / "metrics.jsonl")
    environment = describe_environment()
    return {
        "format": FORMAT,
        "plan": run.plan.name,
        "arm": run.key.arm,
        "beta": run.key.beta,
        "seed": run.key.seed,
        "settings_sha256": run.digest,
        "kl_beta": run.beta,
        "warm_start": {"seed": run.plan.warm_start(run.key.seed), "sha256": weights_sha256(run.model)},
        "commit": environment["commit"],
        "torch": environment["versions"]["torch"],
        "cpu_seconds_of_last_start": {name: round(value, 1) for name, value in seconds.items()},
        "steps": len(rows),
        "reply_tokens": json.loads((training / SUMMARY).read_text(encoding="utf-8"))["reply_tokens"],
        "mean_beta": _mean(rows, "beta_eff"),
        "kl_at_end": _mean(rows[-20:], "kl"),
        "no_signal": _mean(rows, "zero_variance_fraction"),
        "num_replies": run.plan.num_replies,
        "correct": {name: found.correct for name, found in counts.items()},
        "last_total": {name: found.last_total for name, found in counts.items()},
        "curve": [[row["step"], row["reply_tokens"], _pass_at_1(row)] for row in _rows(training / "evaluations.jsonl")],
        "trajectory": {
            name: [
                float(f"{_mean(rows[start : start + TRAJECTORY_STEPS], name):.4g}")
                for start in range(0, len(rows), TRAJECTORY_STEPS)
            ]
            for name in TRAJECTORY
        },
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def _pass_at_1(row: dict[str, Any]) -> float:
    found = pass_at(row["sets"][HELD_OUT], 1)
    assert found is not None
    return round(found.mean, 5)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, which `expo.ablation --plan` calls: 0 if the run is finished or was asked to stop."""
    name, arm, beta, seed, out, results = sys.argv[1:] if argv is None else argv
    with errors_on_one_line(PROGRAM):
        run = FrontierRun(PLANS[name], RunKey(arm, float(beta), int(seed)), Path(out), Path(results))
        if not run.is_ready:
            raise AblationError(f"{run.name} takes its KL coefficient from {run.key.pair}, which is not finished")
        execute(run)
    leave_ranks()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
