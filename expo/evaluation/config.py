"""The command line of `python -m expo.evaluate`, and what its MODEL stands for.

If MODEL is a run, settings that are not given are those of the run; otherwise they have the defaults of `expo.config`.
With --like, those on which the scores depend are the ones of another run or evaluation.
"""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.config import EVALUATION_FIELDS, EvalConfig, evaluation_values, load_config
from expo.errors import ConfigError
from expo.evaluation.like import Like, like_evaluation, like_run
from expo.runtime.cli import add_field, filled, flag_parser, read_flags, sections_of
from expo.runtime.config_errors import Overrides, merged
from expo.runtime.flag_help import most_used
from expo.runtime.parser import fail

PROGRAM = "python -m expo.evaluate"
FOLDER = Path("evaluations")
EXPORT = "export"
SHORT_FLAGS = {
    "evaluation.num_samples": "--num-samples",
    "evaluation.temperature": "--temperature",
    "evaluation.top_p": "--top-p",
    "rollout.max_new_tokens": "--max-new-tokens",
    "rollout.engine": "--engine",
    "data.prompt": "--prompt",
    "run.seed": "--seed",
    "run.dir": "--out",
}
"""Fields with a short flag in addition to --section.field."""
COMMON = {
    "evaluation.num_samples": "replies per question",
    "evaluation.temperature": "sampling temperature; 0: greedy",
    "evaluation.top_p": "",
    "rollout.max_new_tokens": "longest reply",
    "rollout.engine": "",
    "rollout.batch_size": "replies generated at once",
    "data.prompt": "",
    "reward.verifier": "math, exact, choice or module:function",
    "run.seed": "",
    "run.dir": "folder of results",
}
"""The settings that --help shows."""
SETS_AND_STEP = """\
  MODEL                     transformers folder, hub id, run, checkpoint, ledger
  --sets [NAME=]SOURCE ...  question sets, as data.train (those of the run)
  --step N                  this checkpoint of a run (export, or newest)
  --like RUN                sets and protocol of this run or evaluation"""
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class EvalArguments:
    """A parsed command line of `python -m expo.evaluate`.

    model: MODEL as it was given; config: model.path is the model to load, run.dir the folder of results; run: the run
    whose checkpoint holds the weights, None if model.path holds them; step: of that checkpoint, None for the newest;
    notes: of --like, lines to show.
    """

    model: str
    config: EvalConfig
    run: Path | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()


def parse_command_line(argv: Sequence[str], prog: str = PROGRAM) -> EvalArguments:
    """Parses a command line of `prog` (without the program's name).

    Exits: 0 after --help or --help-all; 2 with one line on stderr if the command line is wrong.
    """
    parser = _parser(prog)
    known = ["--sets", "--step", "--like", *SHORT_FLAGS.values(), *(f"--{name}" for name in EVALUATION_FIELDS)]
    try:
        options, overrides = read_flags(parser, argv, known)
        if options["sets"] is not None:
            overrides.append(("evaluation.sets", name_sets(options["sets"])))
        step = None if options["step"] is None else step_number(options["step"])
        return resolve(options["model"], step, overrides, options["like"])
    except ConfigError as error:
        fail(prog, error)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = flag_parser(
        prog,
        usage="%(prog)s MODEL [--sets SOURCE ...] [--like RUN] [...]\n       %(prog)s compare A B [...]",
        description="pass@k, mean@n and maj@n of a model on sets of questions, with 95 % intervals.\n"
        "The same command resumes an interrupted evaluation.",
        short="\n\n".join((SETS_AND_STEP, most_used(sections_of(EvalConfig), COMMON, SHORT_FLAGS))),
        num_settings=len(EVALUATION_FIELDS),
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
    parser.add_argument(
        "--like",
        metavar="RUN",
        help="take the sets and every setting on which scores depend from this run, or from the folder of an "
        "evaluation; settings that are given too replace them, and are named",
    )
    for name in EVALUATION_FIELDS:
        add_field(parser, EvalConfig, name, *([SHORT_FLAGS[name]] if name in SHORT_FLAGS else []))
    return parser


def step_number(text: str) -> int:
    """The value of --step. Raises: ConfigError if it is not a step's number."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"--step = {text[:80]!r}; expected the number of a checkpoint's step, such as 50")
    return int(text)


def name_sets(texts: Sequence[str]) -> dict[str, str]:
    """Sources by name, from "NAME=SOURCE" or "SOURCE"; the latter is named after the last part of its path.

    Raises: ConfigError if two have the same name.
    """
    sets: dict[str, str] = {}
    for text in texts:
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


def resolve(model: str, step: int | None, overrides: Overrides, like: str | None = None) -> EvalArguments:
    """Finds the weights that MODEL stands for, and builds the configuration, with the protocol of `like` if given.

    Raises: ConfigError if --step does not fit MODEL, `like` is neither a run nor an evaluation, or a value is wrong.
    """
    run, step = find_run(model, step)
    name = _last_part(str(run or model)) + ("" if step is None else f"-step-{step}")
    protocol = None if like is None else _read_like(like)
    config = _build_config(model, run, protocol, [("run.dir", str(FOLDER / name)), *overrides])
    notes = () if protocol is None else protocol.notes(config, overrides)
    if not config.evaluation.sets:
        raise ConfigError("no questions; give --sets [NAME=]SOURCE ...")
    if run is not None and step is None and (run / EXPORT / "config.json").is_file():
        exported = config.model.model_copy(update={"path": str(run / EXPORT), "revision": None})
        return EvalArguments(model, config.model_copy(update={"model": exported}), notes=notes)
    return EvalArguments(model, config, run, step, notes)


def _read_like(like: str) -> Like:
    run, _ = find_run(like, None)
    if run is None:
        return like_evaluation(Path(like))
    return like_run(run / "config.yaml", load_config(run / "config.yaml"))


def find_run(model: str, step: int | None) -> tuple[Path | None, int | None]:
    """The run folder that `model` is or lies in (None if there is none), and the step of its checkpoint that `step` or
    `model` names (None if neither does).

    Raises: ConfigError if `step` does not fit `model`.
    """
    path = Path(model)
    checkpoint = re.fullmatch(r"step-([0-9]{1,9})", path.name)
    if checkpoint and _is_run(path.parent.parent):
        if step not in (None, int(checkpoint[1])):
            raise ConfigError(f"--step = {step}, but {model} is the checkpoint of another step; drop one")
        return path.parent.parent, int(checkpoint[1])
    if path.name == EXPORT and _is_run(path.parent):
        path = path.parent
    if _is_run(path):
        return path, step
    if step is not None:
        raise ConfigError(
            f"--step = {step} names a checkpoint of a run, but {model} is no run folder; give one, or leave --step out"
        )
    return None, None


def _is_run(path: Path) -> bool:
    try:
        return (path / "config.yaml").is_file()
    except OSError:  # the name is too long, or a folder cannot be read
        return False


def _build_config(model: str, run: Path | None, like: Like | None, overrides: Overrides) -> EvalConfig:
    values: dict[str, Any] = {"model": {"path": model}}
    if run is not None or model == "ledger":
        values = evaluation_values(load_config(run and run / "config.yaml"))
    file, given = run and run / "config.yaml", [name for name, _ in overrides]
    if like is not None:
        require_given_code(like.file, _code_of(like.sections()), given)
        given += like.values
    if file is not None:
        require_given_code(file, _code_of(values), given)
    if like is not None:
        file, values = like.file, merged(values, like.sections())
    return filled(EvalConfig, values, overrides, f"{file}: " if file else "")


def _code_of(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    verifier, remote = values["reward"].get("verifier"), values["model"].get("trust_remote_code")
    return {
        "reward.verifier": verifier if ":" in str(verifier) else None,  # module:function
        "model.trust_remote_code": "true" if remote else None,
    }


def require_given_code(file: Path, code: Mapping[str, str | None], given: Collection[str]) -> None:
    """A folder of a run or an evaluation is data and may come from anybody: code that its configuration names runs only
    if the command line names it too.

    Args:
        file: the configuration.
        code: settings that name code, with their values; None: it names none.
        given: the settings of the command line.

    Raises: ConfigError that says what to give.
    """
    for name, value in code.items():
        if value is not None and name not in given:
            raise ConfigError(
                f"{file} names code: {name} = {value}; if you trust it, give --{name}={value}, otherwise another value"
            )
