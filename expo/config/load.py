"""Reads a RunConfig from a YAML file and from the command line of `python -m expo.train`."""

from collections.abc import Sequence
from pathlib import Path

from expo.config.run import RunConfig
from expo.runtime.cli import Invocation, Overrides, filled, parse, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = RECIPES / "ledger.yaml"


def load_config(path: Path | None, overrides: Overrides = ()) -> RunConfig:
    """The configuration in a YAML file (None: the embedded default), with dotted overrides applied.

    A file may name another file in its folder, `base: other.yaml`, whose fields are its defaults.

    Raises: ConfigError if the file cannot be read, a key is unknown, a value has the wrong type or range, or the
        values do not go together.
    """
    source = path or DEFAULT_RECIPE
    return filled(RunConfig, read_recipe(source), overrides, f"{source.name}: " if path else "")


def parse_command_line(argv: Sequence[str], prog: str = "python -m expo.train") -> Invocation[RunConfig]:
    """Parses a command line of `prog` (without the program's name).

    Exits: 0 after --help or --print-config; 2 with one line on stderr if the command line or the configuration is
        wrong.
    """
    return parse(RunConfig, load_config, argv, prog)
