"""What is compared: arms, which differ in the method; pools of questions; and the settings that all runs share.

Runs of one pool and seed are a pair: the same warm start, the same questions, the same seed of draws and samples, the
same budget of sampled tokens. They differ in their arm alone.
"""

import json
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
"""Flags of `python -m expo.train` by arm: each of the paper's two parts alone, both, and both with our estimate."""
ADDED = ("expo-counted", "expo")
"""An arm and what it is set against besides the baseline: added after the plan, so a family of its own."""

# half of the default's 1,024: a run half as long as the default visits a question as often as the default does
_BALANCED_COUNT = 512
POOLS: dict[str, Callable[[int], list[LedgerQuestion]]] = {
    "balanced": lambda seed: train_questions(seed)[:_BALANCED_COUNT],
    "skewed": skewed_questions,
}
"""Training questions by pool, from a seed; none is held out."""

EVALUATED = "held_out"
SHARED = (
    "--run.steps=400",  # more than the budget lets any arm take
    "--run.checkpoint_every=25",
    "--run.keep_checkpoints=1",
    "--run.keep_best=false",
    "--run.completions_per_step=0",
    # a rate that falls with the steps would favour arms with short replies, which take more of them
    "--optimizer.schedule=constant",
    f"--evaluation.sets={{{EVALUATED}: ledger:held_out}}",
    "--evaluation.num_samples=16",
    "--evaluation.every=20",
)
"""Flags of every run, over the embedded default."""


@dataclass(frozen=True)
class Run:
    """One training run of the ablation: `config` is all that `python -m expo.train` needs."""

    pool: str
    arm: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """For people: pool, arm and seed."""
        return f"{self.pool}, {self.arm}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.config.run.dir is not None
        return self.config.run.dir

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended; its summary is the last thing but the report that it writes."""
        return (self.folder / "summary.json").exists()


def parse_arm(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and flags of an arm given as `name=--a.b=value,--c.d=value`.

    Raises: ConfigError if it is not of that form.
    """
    name, _, flags = text.partition("=--")
    if not name or not flags or "/" in name:
        raise ConfigError(f"--arm {text} is not an arm; expected name=--section.field=value,--section.field=value")
    return name, tuple(f"--{flag}" for flag in flags.split(",--"))


def with_arms(arms: Mapping[str, Sequence[str]], texts: Sequence[str]) -> dict[str, Sequence[str]]:
    """`arms`, and those given as `parse_arm` reads them.

    Raises: ConfigError if one is not of that form, or has the name of another: tables tell arms by their names alone.
    """
    found = dict(arms)
    for text in texts:
        name, flags = parse_arm(text)
        if name in ARMS or name in found:
            meant = f"{name} is {' '.join(ARMS[name])}" if name in ARMS else f"{name} has been given before"
            raise ConfigError(f"--arm {text} would redefine an arm: {meant}; give yours another name")
        found[name] = flags
    return found


def plan_runs(
    out: Path, arms: Mapping[str, Sequence[str]], pools: Sequence[str], num_seeds: int, shared: Sequence[str]
) -> list[Run]:
    """All runs, one seed after the other, so that what is done is in pairs; writes the pools' question files.

    Args:
        out: the ablation's folder.
        arms: flags by name.
        pools: names in `POOLS`.
        num_seeds: seeds are 0, 1, ...
        shared: flags of every run; an arm's own come after them and win.

    Raises: ConfigError if a folder holds a run with other settings, or runs would not be measured. Exits like
        `expo.train` if a flag is wrong.
    """
    runs = []
    for seed in range(num_seeds):
        for pool in pools:
            questions = _write_pool(out / "pools" / f"{pool}-{seed}.jsonl", POOLS[pool](seed))
            for arm, flags in arms.items():
                folder = out / "runs" / pool / arm / f"seed-{seed}"
                own = (f"--run.dir={folder}", f"--run.seed={seed}", f"--data.train={questions}")
                config = parse_command_line([*shared, *flags, *own], PROGRAM).config
                runs.append(Run(pool, arm, seed, config))
                _require_same(runs[-1])
                _require_measurable(config)
    return runs


def _write_pool(path: Path, questions: Sequence[LedgerQuestion]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(path, "".join(json.dumps(question._asdict()) + "\n" for question in questions).encode())
    return path


def _require_same(run: Run) -> None:
    saved = run.folder / "config.yaml"
    if not saved.exists():
        return
    differing = changed_settings(_settings(load_config(saved)), _settings(run.config))
    if differing:
        raise ConfigError(
            f"{run.folder} was run with other settings: {', '.join(differing)}; leave them as they were, or choose "
            f"another --out"
        )


def _require_measurable(config: RunConfig) -> None:
    evaluation = config.evaluation
    if EVALUATED not in evaluation.sets or evaluation.num_samples <= 8:
        raise ConfigError(
            f"evaluation.sets = {evaluation.sets} and evaluation.num_samples = {evaluation.num_samples} give no pass@8 "
            f"of a set {EVALUATED}, by which runs are compared; name one so, and take more than 8 samples"
        )


def _settings(config: RunConfig) -> dict[str, object]:
    """All settings by dotted name but those that say where files lie: the whole folder may have been moved."""
    return {name: value for name, value in config.settings.items() if name not in ("run.dir", "data.train")}
