"""The command line of `python -m expo.evaluate`: a run's configuration, of which an evaluation reads a part.

Where MODEL is a run, that run's own configuration is what is not given; else the defaults of `expo/config.py` are.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.config import RunConfig, VllmSection, load_config
from expo.errors import ConfigError
from expo.runtime.cli import add_field, fail, filled, flag_parser, read_flags

PROGRAM = "python -m expo.evaluate"
FOLDER = Path("evaluations")
EXPORT = "export"
SHORT = {
    "evaluation.num_samples": "--num-samples",
    "evaluation.temperature": "--temperature",
    "evaluation.top_p": "--top-p",
    "rollout.max_new_tokens": "--max-new-tokens",
    "rollout.engine": "--engine",
    "data.prompt": "--prompt",
    "run.seed": "--seed",
    "run.dir": "--out",
}
"""Fields with a name of their own here."""
READ = (
    *SHORT,
    "model.attention",
    "data.chat_template",
    "data.max_prompt_tokens",
    "data.skip_bad_answers",
    "rollout.batch_size",
    "rollout.sync_tolerance",
    "vllm.gpu_memory_utilization",
    "vllm.cache_gib",
    "vllm.enforce_eager",
    "vllm.tensor_parallel",
    "reward.workers",
    "reward.timeout_s",
    "policy.dtype",
    "run.threads",
    "run.device",
    "deadline.start",
    "deadline.evaluation",
)
"""Every field that an evaluation reads; any other would be ignored, and is refused."""
UNTRAINED = (
    ("data.train", "none"),
    ("policy.micro_batch_tokens", 2**31),
    ("reward.correct_weight", 1),
    ("reward.overlong_buffer", 0),
    ("vllm.sleep", False),
    *((f"vllm.{field}", VllmSection.model_fields[field].default) for field in ("servers", "gpus", "weights_folder")),
)
"""What a configuration must say of training, and of servers beside it, where there is none: a run's own values may not
go with the engine and the lengths that an evaluation takes.
"""
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Invocation:
    """A command line of `python -m expo.evaluate`, understood.

    model: as given; config: model.path is what is loaded, run.dir where results go; run: the run folder whose
    checkpoint is to be read, or None; step: of that checkpoint, None for the newest one.
    """

    model: str
    config: RunConfig
    run: Path | None = None
    step: int | None = None


def parse_command_line(argv: Sequence[str]) -> Invocation:
    """The evaluation that a command line asks for.

    Exits: 0 after --help; 2 with one line on stderr if the command line is wrong.
    """
    parser = _parser()
    known = ["--sets", "--step", *SHORT.values(), *(f"--{name}" for name in READ)]
    try:
        given, overrides = read_flags(parser, argv, known)
        if given["sets"] is not None:
            overrides.append(("evaluation.sets", name_sets(given["sets"])))
        step = given["step"]
        return resolve(given["model"], None if step is None else _step_number(step), overrides)
    except ConfigError as error:
        fail(PROGRAM, error)


def _parser() -> argparse.ArgumentParser:
    parser = flag_parser(
        PROGRAM,
        usage="%(prog)s MODEL [--sets [NAME=]SOURCE ...] [--step N] [--num-samples N] [--out DIR] [...]\n"
        "       %(prog)s compare A B [...]",
        description="pass@k, mean@n and maj@n of a model on sets of questions, with 95 % intervals. Where such an "
        "evaluation stopped, the same command goes on.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="transformers folder or hub id, run folder, checkpoint folder, or ledger"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="[NAME=]SOURCE",
        help="question sets, as data.train (default: evaluation.sets of the run)",
    )
    parser.add_argument("--step", metavar="N", help="this checkpoint of a run (default: its export, else the newest)")
    for name in READ:
        add_field(parser, RunConfig, name, *([SHORT[name]] if name in SHORT else []))
    return parser


def _step_number(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--step = {text!r}; expected the number of a checkpoint's step, such as 50")
    return int(text)


def name_sets(given: Sequence[str]) -> dict[str, str]:
    """Sources by name; one given without a name is named after the last part of its path.

    Raises: ConfigError if two have one name.
    """
    sets: dict[str, str] = {}
    for text in given:
        named = re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+)", text)
        name, source = named.groups() if named else (_last_part(text), text)
        if name in sets:
            raise ConfigError(f"--sets has two sets of the name {name}; give one of them another: NAME={source}")
        sets[name] = source
    return sets


def _last_part(source: str) -> str:
    name = re.split(r"[/:]", source.rstrip("/"))[-1]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def resolve(model: str, step: int | None, overrides: Sequence[tuple[str, Any]]) -> Invocation:
    """What MODEL stands for, and the whole configuration.

    Raises: ConfigError if --step does not fit MODEL, or a value is wrong.
    """
    run, step = _run_of(model, step)
    name = _last_part(str(run or model)) + ("" if step is None else f"-step-{step}")
    config = _configured(model, run, [("run.dir", str(FOLDER / name)), *overrides])
    if not config.evaluation.sets:
        raise ConfigError("no questions; give --sets [NAME=]SOURCE ...")
    if run is not None and step is None and (run / EXPORT / "config.json").is_file():
        at_export = config.model.model_copy(update={"path": str(run / EXPORT)})
        return Invocation(model, config.model_copy(update={"model": at_export}))
    return Invocation(model, config, run, step)


def _run_of(model: str, step: int | None) -> tuple[Path | None, int | None]:
    """The run folder that MODEL is or lies in, None if there is none, and the step of the checkpoint asked for."""
    path = Path(model)
    checkpoint = re.fullmatch(r"step-(\d+)", path.name)
    if checkpoint and _is_run(path.parent.parent):
        if step not in (None, int(checkpoint[1])):
            raise ConfigError(f"--step = {step}, but MODEL = {model} is the checkpoint of another step; drop one")
        return path.parent.parent, int(checkpoint[1])
    if path.name == EXPORT and _is_run(path.parent):
        path = path.parent
    if _is_run(path):
        return path, step
    if step is not None:
        raise ConfigError(
            f"--step = {step} names a checkpoint of a run, but MODEL = {model} is no run folder; give one, or leave "
            f"--step out"
        )
    return None, None


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _configured(model: str, run: Path | None, overrides: Sequence[tuple[str, Any]]) -> RunConfig:
    settings = [*UNTRAINED, *overrides]
    if run is not None or model == "ledger":
        config = load_config(run and run / "config.yaml", settings)
    else:
        config = filled(RunConfig, {"model": {"path": model}}, settings)
    if config.rollout.engine == "vllm-server":
        raise ConfigError("rollout.engine = vllm-server is for training; give --engine=vllm or --engine=transformers")
    return config
