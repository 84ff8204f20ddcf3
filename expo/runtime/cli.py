"""Command lines and YAML files into a configuration, with every error as one line.

A configuration is a pydantic model whose fields are sections. `expo.config` defines them; the descriptions of their
fields are the text of --help.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expo.errors import ConfigError, OutputError
from expo.runtime.bounded_yaml import YamlError, load_yaml, read_yaml
from expo.runtime.config_errors import Overrides, explain, explain_all, merged, with_overrides
from expo.runtime.flag_help import ShortHelp, long_help, most_used, value_name
from expo.runtime.nearest import nearest
from expo.runtime.parser import OneLineParser, fail
from expo.runtime.stdout import write_stdout

Config = TypeVar("Config", bound=BaseModel)
ADVICE = "Advice on kl.beta and the curriculum, and its evidence: docs/curriculum.md."
NULLS = ("", "~", "null", "Null", "NULL")  # of YAML


class Invocation(BaseModel, Generic[Config]):
    """The parsed command line of `python -m expo.train`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    config: Config
    resume: bool = False
    dry_run: bool = False
    """Check the start of the run, print memory, disk space and time, and stop."""
    ranks: Annotated[int, Field(ge=1)] | None = None
    """Number of GPUs to plan for; None: those of this machine."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of each in GiB; None: that of this machine's GPU."""
    gpus: str | None = None
    """GPUs to plan for, such as 8x80GiB or H100; None: ranks and gpu_memory_gib."""
    fit: Path | None = None
    """New YAML file for the configuration that fits."""


# --- values


def read_recipe(source: Path, *, may_have_base: bool = True) -> dict[str, Any]:
    """The sections of a YAML file, merged over those of its base."""
    try:
        raw = read_yaml(source)
    except OSError as error:
        raise ConfigError(
            f"cannot read the config file {source}: {error.strerror}; give an existing YAML file"
        ) from error
    except YamlError as error:
        raise ConfigError(f"{source} is not YAML as expected: {error}") from error
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{source} holds a {type(raw).__name__}; expected sections such as `model:` and `data:`")
    values = dict(raw or {})
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str) or not may_have_base:
        given = "a base of a base" if isinstance(base, str) else "not a file name"
        raise ConfigError(f"{source}: base = {base!r} is {given}; expected the file name of a recipe without a base")
    return merged(read_recipe(source.parent / base, may_have_base=False), values)


def filled(kind: type[Config], values: dict[str, Any], overrides: Overrides = (), where: str = "") -> Config:
    """Builds the configuration from its sections, with overrides applied.

    Raises: ConfigError if a key is unknown, a value has the wrong type or range, or values contradict each other; its
        message begins with `where` if the value stands in the file, and names the flag if it is an override.
    """
    try:
        return kind.model_validate(with_overrides(values, overrides))
    except ValidationError as error:
        known = [*field_names(kind), *sections_of(kind)]
        raise ConfigError(explain_all(error, kind, values, overrides, where, known)) from error


def as_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML; reading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def sections_of(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a configuration, by name."""
    sections = {}
    for name, info in kind.model_fields.items():
        assert isinstance(info.annotation, type)
        sections[name] = info.annotation
    return sections


def field_names(kind: type[BaseModel]) -> list[str]:
    """Every `section.field` of a configuration."""
    return [f"{name}.{field}" for name, section in sections_of(kind).items() for field in section.model_fields]


# --- flags


def parse(
    kind: type[Config],
    load: Callable[[Path | None, Overrides], Config],
    argv: Sequence[str],
    prog: str,
    common: Mapping[str, str],
) -> Invocation[Config]:
    """Parses a command line of the trainer.

    Args:
        kind: the class of the configuration; its fields are the flags.
        load: reads the configuration from a file, or the default one, and applies overrides.
        argv: the arguments.
        prog: the program's name in messages.
        common: the fields that --help shows, and a few words about each.

    Exits: 0 after --help, --help-all or --print-config; 2 with one line on stderr if the command line or
        config is wrong.
    """
    parser = _parser(kind, prog, common)
    try:
        options, overrides = read_flags(parser, argv, [*OPTIONS, *(f"--{name}" for name in field_names(kind))])
        path, print_config = options.pop("config"), options.pop("print_config")
        invocation = _invocation(load(path, overrides), options)
    except ConfigError as error:
        fail(prog, error)
    if print_config:
        try:
            write_stdout(as_yaml(invocation.config))
        except OutputError as error:
            fail(prog, error)
        raise SystemExit(0)
    return invocation


OPTIONS = {
    "--resume": "continue from the newest whole checkpoint, if any",
    "--print-config": "print the resolved configuration and stop",
    "--dry-run": "check the start of the run, print its plan, and stop",
}


def _parser(kind: type[BaseModel], prog: str, common: Mapping[str, str]) -> argparse.ArgumentParser:
    options = "\n".join(f"  {flag:16}{text}" for flag, text in OPTIONS.items())
    parser = flag_parser(
        prog,
        usage="%(prog)s [CONFIG.yaml] [--section.field=value ...]\n       [--resume] [--print-config | --dry-run]",
        description="Train a policy with EXPO; without CONFIG.yaml, the embedded demonstration.",
        short="\n\n".join((options, most_used(sections_of(kind), common), ADVICE)),
        num_settings=len(field_names(kind)),
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="a recipe; see expo/recipes/")
    for option, text in OPTIONS.items():
        parser.add_argument(option, action="store_true", help=text)
    parser.add_argument(
        "--ranks", metavar="N", help="with --dry-run: number of GPUs to plan for (default: those of this machine)"
    )
    parser.add_argument(
        "--gpu-memory-gib",
        metavar="GIB",
        help="with --dry-run: memory of each GPU (default: that of this machine's, or 80)",
    )
    parser.add_argument(
        "--gpus", metavar="GPUS", help="with --dry-run: GPUs to plan for, such as 1x24GiB, 8x80GiB, 8xH100 or L4"
    )
    parser.add_argument(
        "--fit", metavar="FILE.yaml", help="with --dry-run: write the configuration, changed so that it fits the GPUs"
    )
    for name, section in sections_of(kind).items():
        group = parser.add_argument_group(name, section.__doc__)
        for field in section.model_fields:
            add_field(group, kind, f"{name}.{field}")
    return parser


def _invocation(config: Config, options: dict[str, Any]) -> Invocation[Config]:
    """Validates the other options of the command line."""
    for name in ("ranks", "gpu_memory_gib", "gpus", "fit"):
        if options[name] is not None and not options["dry_run"]:
            raise ConfigError(f"--{name.replace('_', '-')} is only for --dry-run; add --dry-run, or leave it out")
    try:
        return Invocation(config=config, **options)
    except ValidationError as error:
        problems = "; ".join(f"--{explain(item, ()).replace('_', '-')}" for item in error.errors())
        raise ConfigError(problems) from error


def flag_parser(prog: str, usage: str, description: str, short: str, num_settings: int) -> argparse.ArgumentParser:
    """A parser to which a program adds its flags; flags cannot be abbreviated.

    Args:
        prog: the program's name in messages.
        usage: the first lines of the help.
        description: what the program does.
        short: the most used flags, which --help shows; --help-all shows all.
        num_settings: how many --help-all shows.
    """
    parser = OneLineParser(
        prog=prog, usage=usage, description=description, allow_abbrev=False, add_help=False, formatter_class=_Formatter
    )
    end = f"--help-all lists all {num_settings} settings: choices, units, defaults and sources."
    parser.add_argument("-h", "--help", action=ShortHelp, text=f"{description}\n\n{short}\n\n{end}")
    parser.add_argument("--help-all", action="help", help="show every setting")
    # DeepSpeed's launcher passes it to every rank; LOCAL_RANK in the environment has the same value
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Leaves 36 columns to the flags, so that most of them stand beside their text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def add_field(group: Any, kind: type[BaseModel], name: str, *aliases: str) -> None:
    """Adds the flag of `section.field`, and its aliases, to an argument parser; its help is the field's description."""
    section, field = name.split(".")
    info = sections_of(kind)[section].model_fields[field]
    group.add_argument(
        *aliases,
        f"--{name}",
        dest=name,
        metavar=value_name(info.annotation),
        type=FlagText if info.annotation in (str, str | None) else str,
        default=argparse.SUPPRESS,
        help=long_help(info),
    )


def read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], known: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Parses a command line into options by name, and overrides of config fields.

    Raises: ConfigError if a flag is unknown, with the most similar of the `known` ones, or a field's value is not YAML.
    """
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    options = vars(parsed)
    del options["local_rank"]
    overrides = [(name, flag_value(name, options.pop(name))) for name in list(options) if "." in name]
    return options, overrides


class FlagText(str):
    """The value of a flag whose setting is a text: `{question} Be brief.` need not be quoted as in YAML."""

    __slots__ = ()


def flag_value(name: str, text: str) -> Any:
    """The value of a flag, parsed as YAML; a `FlagText` is taken as it is unless it is YAML's null or a quoted text.

    Raises: ConfigError if it is not YAML.
    """
    if isinstance(text, FlagText) and text not in NULLS and text[0] not in "\"'":
        return str(text)
    try:
        return load_yaml(text)
    except YamlError as error:
        if isinstance(text, FlagText):
            return str(text)
        raise ConfigError(f"--{name}={text[:80]} is not a YAML value as expected: {error}") from error
