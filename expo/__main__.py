"""All commands under one name: `expo-rl COMMAND ...`, the same as `python -m expo.COMMAND ...`.

A command's module is imported when the command is given, so that `--help` is fast, and `doctor` works where packages
are missing.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from expo.errors import ConfigError
from expo.runtime.endings import errors_on_one_line, run_and_exit
from expo.runtime.nearest import nearest
from expo.runtime.parser import CONFIG_SUFFIXES
from expo.runtime.requirements import installed_version
from expo.runtime.stdout import write_stdout

PROGRAM = "expo-rl"
COMMANDS = {
    "train": ("expo.train", "train a policy, or plan a run (--dry-run)"),
    "evaluate": ("expo.evaluate", "pass@k of a model or a run, and comparisons"),
    "data": ("expo.data.__main__", "show prompts, or check a set of questions"),
    "report": ("expo.report", "draw the report of a run"),
    "export": ("expo.export", "write a checkpoint as a transformers folder or a PEFT adapter"),
    "serve": ("expo.serve", "serve rollouts by vLLM"),
    "ablation": ("expo.ablation.__main__", "compare EXPO, each of its two parts, and GRPO"),
    "doctor": ("expo.doctor", "check this machine: versions, devices, kernels, extras"),
}
"""The module of each command, and what it does."""
HINT = "; --help lists the commands"


def console() -> NoReturn:
    """The console script: `main`, with modules of the working directory importable as under `python -m`."""
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))
    run_and_exit(main)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. Exit codes: those of the command; 2 with one line on stderr if there is no such
    command, or a package is missing; 130 after Ctrl-C.
    """
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or [""]
    with errors_on_one_line(f"{prog} {command}" if command in COMMANDS else prog):
        if command in ("-h", "--help"):
            write_stdout(help_text(prog))
        elif command == "--version":
            write_stdout(f"expo-rl {installed_version('expo-rl') or 'of a source tree that is not installed'}\n")
        elif command in COMMANDS:
            return _imported(command)(arguments, f"{prog} {command}")
        else:
            raise ConfigError(_unknown(command, prog))
    return 0


def help_text(prog: str) -> str:
    """The text of --help."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: {prog} COMMAND [...]\n\nReinforcement learning with verifiable rewards: EXPO and GRPO.\n\n"
        f"commands:\n{lines}\n\n{prog} COMMAND --help shows what a command takes; {prog} --version the version.\n"
        f"python -m expo.COMMAND is the same command, for torchrun and other launchers.\n"
    )


def _unknown(command: str, prog: str) -> str:
    if not command:
        return f"no command; expected one of {', '.join(COMMANDS)}{HINT}"
    if command.startswith("-") or command.endswith(CONFIG_SUFFIXES):
        return f"{command[:80]!r} is no command; a command comes first, such as {prog} train {command[:80]}{HINT}"
    return f"unknown command {command[:80]!r}{nearest(command, list(COMMANDS), HINT)}"


def _imported(command: str) -> Callable[[Sequence[str], str], int]:
    """The `main` of a command. Raises: ConfigError if a package that it imports is not installed."""
    try:
        main: Callable[[Sequence[str], str], int] = importlib.import_module(COMMANDS[command][0]).main
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "expo", "expo_kernels"):
            raise
        raise ConfigError(
            f'the package {missing} is not installed; install it with pip install "expo-rl[train]", and see '
            f"{PROGRAM} doctor"
        ) from error
    return main


if __name__ == "__main__":
    run_and_exit(lambda: main(prog="python -m expo"))
