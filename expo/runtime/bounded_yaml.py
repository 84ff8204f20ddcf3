"""YAML as users give it, within bounds: a text that would take much time or memory is refused while it is read.

PyYAML takes quadratic time for nested brackets, expands aliases without a limit, and its constructors raise more than
YAMLError for values such as 2026-99-99.
"""

import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from expo.errors import first_line

MOST_CHARACTERS = 2**18
MOST_DEPTH = 20
MOST_NODES = 20_000  # values, with each alias counted as all that it stands for
MOST_NUMBER_CHARACTERS = 400  # of a plain scalar that begins like a number; the largest float has 309 digits


class YamlError(ValueError):
    """The text is no YAML, or exceeds the bounds; the message is one line."""


def read_yaml(path: Path) -> Any:
    """The content of a file. Raises: OSError; YamlError."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise YamlError(f"it is not UTF-8: {error}") from error
    except ValueError as error:  # a path with a NUL character
        raise YamlError(first_line(error)) from error
    return load_yaml(text)


def load_yaml(text: str) -> Any:
    """What a text stands for. Raises: YamlError."""
    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"it has more than {MOST_CHARACTERS:,} characters")
    try:
        _check_size(text)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())[:300]) from error
    except YamlError:
        raise
    except Exception as error:  # PyYAML's constructors let errors of int(), date() and others through
        raise YamlError(first_line(error)) from error
    _check_types(value)
    return value


def _check_size(text: str) -> None:
    """Raises YamlError if a text is nested too deeply, or too large with its aliases expanded."""
    sizes: dict[str, int] = {}  # by anchor
    opened: list[tuple[str | None, int]] = []  # anchor of each open list or mapping, and the nodes before it
    num_nodes = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            # an alias inside of the collection that it stands for is endless; its size is not known yet
            num_nodes += sizes.get(str(event.anchor), MOST_NODES + 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, num_nodes))
            num_nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = num_nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > MOST_NUMBER_CHARACTERS and re.match(r"[-+.\d]", event.value) and not event.style:
                raise YamlError(f"a number has more than {MOST_NUMBER_CHARACTERS} characters")
        if len(opened) > MOST_DEPTH:
            raise YamlError(f"lists and mappings are nested more than {MOST_DEPTH} deep")
        if num_nodes > MOST_NODES:
            raise YamlError(f"it has more than {MOST_NODES:,} values, those of aliases included")


def _check_types(value: Any, name: str = "") -> None:
    """Raises YamlError for what JSON does not have: dates, bytes, sets, and characters that no file can hold."""
    where = f" in {name}" if name else ""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_types(key, name)
            _check_types(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            _check_types(item, name)
    elif isinstance(value, date):
        raise YamlError(f"YAML reads {value}{where} as a date; write it in quotes if a text is meant")
    elif isinstance(value, str):
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise YamlError(f"the text{where} has a NUL character or half of a surrogate pair; remove it")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise YamlError(f"the value{where} is of YAML's type {type(value).__name__}; expected text, number or list")
