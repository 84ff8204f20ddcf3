"""The texts of --help and --help-all for the fields of a configuration: choices, defaults and descriptions."""

import argparse
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NAMES = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", dict: "{NAME: VALUE}"}
NO_FLAGS: Mapping[str, str] = {}


class ShortHelp(argparse.Action):
    """--help: usage, description and the most used flags; --help-all is argparse's own help."""

    def __init__(self, option_strings: list[str], dest: str, text: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show the most used flags")
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints the text and exits with code 0."""
        print(f"{parser.format_usage()}\n{self._text}")
        parser.exit()


def most_used(
    sections: Mapping[str, type[BaseModel]], common: Mapping[str, str], flags: Mapping[str, str] = NO_FLAGS
) -> str:
    """A line for each of the most used settings, with its choices and default.

    Args:
        sections: of the configuration, by name.
        common: `section.field` and a few words about it; "" if its choices say enough.
        flags: short flags by `section.field`.
    """
    names = [flags.get(name, f"--{name}") for name in common]
    width = max(map(len, names)) + 2
    lines = ["most used settings, with their defaults:"]
    for flag, (name, words) in zip(names, common.items(), strict=True):
        section, _, field = name.partition(".")
        info = sections[section].model_fields[field]
        choices = value_name(info.annotation) if get_origin(info.annotation) is Literal else ""
        text = " ".join(part for part in (words, choices, f"({default_of(info)})") if part)
        lines.append(f"  {flag:{width}}{text}")
    return "\n".join(lines)


def value_name(annotation: Any) -> str:
    """What stands for the value of a flag: its choices, or its type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_name(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(value_name(part) for part in arguments if part is not types.NoneType))
    if origin in (list, tuple):
        return f"[{value_name(arguments[0])}, ...]"
    return NAMES.get(origin or annotation, "VALUE")


def default_of(info: FieldInfo) -> str:
    """The default of a field as its flag takes it."""
    if info.is_required():
        return "required"
    value = info.get_default()
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def long_help(info: FieldInfo) -> str:
    """The description of a field and its default, for argparse."""
    default = default_of(info)
    return f"{info.description} ({default if info.is_required() else f'default: {default}'})".replace("%", "%%")
