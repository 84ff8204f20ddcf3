"""The design of the ablation: arms, which differ in the method, pools of questions, and shared settings.

Runs of the same pool and seed are paired: they share the warm start, the questions, the random seed and the budget of
sampled tokens, and differ only in their arm.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expo.config import RunConfig, changed_settings, load_config, parse_command_line
from expo.errors import ConfigError
from expo.ledger import LedgerQuestion, train_questions
from expo.ledger.skewed import skewed_questions
from expo.runtime.atomic_io import write_bytes_whole

PROGRAM = "python -m expo.ablation"
BASELINE = "grpo"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: ("--curriculum.kind=uniform", "--kl.rho=constant"),
    "akl": ("--curriculum.kind=uniform", "--kl.rho=tanh"),
    "gcs": ("--curriculum.kind=gcs", "--kl.rho=constant"),
    "expo": ("--curriculum.kind=gcs", "--kl.rho=tanh"),
    "expo-counted": ("--curriculum.kind=gcs", "--kl.rho=tanh", "--curriculum.estimate=counted"),
}
"""Flags of `python -m expo.train` by arm: GRPO, each part of EXPO alone, both, and both with counted estimates."""
SECONDARY = ("expo-counted", "expo")
"""An arm and the arm it is also compared with; added after the plan, so its tests are a separate family."""

# half of the default's 1,024: with half as many steps as the default, each question is visited as often
_BALANCED_COUNT = 512
POOLS: dict[str, Callable[[int], list[LedgerQuestion]]] = {
    "balanced": lambda seed: train_questions(seed)[:_BALANCED_COUNT],
    "skewed": skewed_questions,
}
"""Training questions by pool, as a function of the seed; none is a held-out question."""

EVALUATED = "held_out"
SHARED = (
    "--run.steps=400",  # the token budget ends every run earlier
    "--run.checkpoint_every=25",
    "--run.keep_checkpoints=1",
    "--run.keep_best=false",
    "--run.completions_per_step=0",
    # a learning rate that decays with steps would favour arms with short replies, which take more steps
    "--optimizer.schedule=constant",
    f"--evaluation.sets={{{EVALUATED}: ledger:held_out}}",
    "--evaluation.num_samples=16",
    "--evaluation.every=20",
)
"""Flags of every run, applied to the default configuration."""


@dataclass(frozen=True)
class PlannedRun:
    """One training run of the ablation with its complete configuration."""

    pool: str
    arm: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Pool, arm and seed as text."""
        return f"{self.pool}, {self.arm}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.config.run.dir is not None
        return self.config.run.dir

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished; only the report is written after its summary."""
        return (self.folder / "summary.json").exists()

    @property
    def is_ready(self) -> bool:
        """True: it depends on no other run."""
        return True

    def command(self) -> list[str]:
        """The command that starts or resumes it; writes its configuration."""
        path = self.folder / "config.yaml"
        write_bytes_whole(path, self.config.to_yaml().encode())
        return [sys.executable, "-m", "expo.train", str(path), "--resume"]


def parse_arm(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and flags of an arm written as `name=--a.b=value,--c.d=value`.

    Raises: ConfigError if `text` does not have that form.
    """
    name, _, flags = text.partition("=--")
    if not name or not flags or "/" in name:
        raise ConfigError(f"--arm {text} is not an arm; expected name=--section.field=value,--section.field=value")
    return name, tuple(f"--{flag}" for flag in flags.split(",--"))


def with_arms(arms: Mapping[str, Sequence[str]], texts: Sequence[str]) -> dict[str, Sequence[str]]:
    """`arms` and those in `texts`, in the form that `parse_arm` reads.

    Raises: ConfigError if a text is malformed or its name is already taken: tables identify arms by name.
    """
    merged = dict(arms)
    for text in texts:
        name, flags = parse_arm(text)
        if name in ARMS or name in merged:
            existing = f"{name} is {' '.join(ARMS[name])}" if name in ARMS else f"{name} was given before"
            raise ConfigError(f"--arm {text} would redefine an arm: {existing}; choose another name")
        merged[name] = flags
    return merged


def plan_runs(
    out: Path,
    arms: Mapping[str, Sequence[str]],
    pools: Sequence[str],
    num_seeds: int,
    shared: Sequence[str],
    prog: str = PROGRAM,
) -> list[PlannedRun]:
    """All runs, ordered by seed so that pairs finish together; writes the question files of the pools.

    Args:
        out: the ablation's folder.
        arms: flags by name.
        pools: names in `POOLS`.
        num_seeds: seeds are 0, 1, ...
        shared: flags of every run; those of an arm override them.
        prog: the program's name in messages.

    Raises: ConfigError if a folder contains a run with other settings, or the measures could not be evaluated. Exits
        like `expo.train` if a flag is invalid.
    """
    runs = []
    for seed in range(num_seeds):
        for pool in pools:
            questions = _write_pool(out / "pools" / f"{pool}-{seed}.jsonl", POOLS[pool](seed))
            for arm, flags in arms.items():
                folder = out / "runs" / pool / arm / f"seed-{seed}"
                own_flags = (f"--run.dir={folder}", f"--run.seed={seed}", f"--data.train={questions}")
                config = parse_command_line([*shared, *flags, *own_flags], prog).config
                runs.append(PlannedRun(pool, arm, seed, config))
                _require_same_settings(runs[-1])
                _require_measures(config)
    return runs


def _write_pool(path: Path, questions: Sequence[LedgerQuestion]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(path, "".join(json.dumps(question._asdict()) + "\n" for question in questions).encode())
    return path


def _require_same_settings(run: PlannedRun) -> None:
    saved = run.folder / "config.yaml"
    if not saved.exists():
        return
    differing = changed_settings(_settings(load_config(saved)), _settings(run.config))
    if differing:
        raise ConfigError(
            f"{run.folder} was run with other settings: {', '.join(differing)}; restore them or choose another --out"
        )


def _require_measures(config: RunConfig) -> None:
    evaluation = config.evaluation
    if EVALUATED not in evaluation.sets or evaluation.num_samples <= 8:
        raise ConfigError(
            f"evaluation.sets = {evaluation.sets} and evaluation.num_samples = {evaluation.num_samples} give no pass@8 "
            f"of the set {EVALUATED}, which the ablation compares; add this set and use more than 8 samples"
        )


def _settings(config: RunConfig) -> dict[str, object]:
    """All settings by dotted name except paths, because the folder may have been moved."""
    return {name: value for name, value in config.settings.items() if name not in ("run.dir", "data.train")}
