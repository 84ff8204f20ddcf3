"""A parser of command lines, and the end of a command at an error: one line on stderr and an exit code.

Only the standard library is imported, so that a command can say which packages are missing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from expo.errors import ConfigError, ExpoError, Interrupted, RankError
from expo.runtime.nearest import nearest

MOST_LINE = 4000  # characters of a message
HELP_HINT = "; --help lists what it takes"
CONFIG_SUFFIXES = (".yaml", ".yml")  # of a run's configuration


class OneLineParser(argparse.ArgumentParser):
    """A parser of command lines that reports a wrong one as one line, without its usage."""

    def parse_args(  # type: ignore[override]  # argparse has overloads by the namespace's type
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The parsed arguments. Exits with code 2 if one is unknown, and names the most similar flag."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for flag in _flags(self) if flag.startswith("--")]
            meant = nearest(unknown[0].split("=")[0], known, HELP_HINT)
            fail(self.prog, ConfigError(f"unknown argument {unknown[0]}{meant}"))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        fail(self.prog, ConfigError(f"{message}{HELP_HINT}"))


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a parser and of its subcommands."""
    flags: list[str] = []
    for action in parser._actions:
        flags += action.option_strings
        if isinstance(action.choices, dict):  # subcommands
            flags += [flag for command in action.choices.values() for flag in _flags(command)]
    return flags


def fail(prog: str, error: ExpoError) -> NoReturn:
    """Exits with the error's exit code; rank 0 prints the error as one line on stderr, and a RankError every rank.

    Before the ranks have joined, the first rank of every node prints it: rank 0 may not have the error.
    """
    rank, is_first_of_node = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK") == "0"
    names_rank = isinstance(error, RankError) or (rank != "0" and is_first_of_node and not _has_joined())
    kind = "" if isinstance(error, Interrupted) else "error: "
    text = " ".join(str(error).splitlines())  # names of files may have line breaks
    text = f"{text[:MOST_LINE]}{'...' if len(text) > MOST_LINE else ''}"
    if (rank == "0" or names_rank) and sys.stderr is not None:
        with suppress(OSError, ValueError):  # stderr may be closed, and its disk full
            sys.stderr.write(f"{prog}: {kind}{f'rank {rank}: ' if names_rank else ''}{text}\n")
    raise SystemExit(error.exit_code) from None


def _has_joined() -> bool:
    torch = sys.modules.get("torch")  # not imported for the sake of an error
    return torch is not None and torch.distributed.is_initialized()
