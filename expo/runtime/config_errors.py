"""The errors of a configuration as one line; each names the flag or the file in which its value stands."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from expo.runtime.nearest import nearest

MOST_PROBLEMS = 5  # explained in one message
MOST_SHOWN = 80  # characters of a value or a name in a message
Values = dict[str, Any]
Overrides = Sequence[tuple[str, Any]]  # "section.field" and its value; the last one of a field wins


def merged(below: Values, above: Values) -> Values:
    """The fields of both, section by section; those of `above` win. Validation reports what is no section."""
    result = dict(below)
    for name, section in above.items():
        lower = result.get(name) or {}
        is_section = isinstance(lower, dict) and isinstance(section, dict)
        result[name] = {**lower, **section} if is_section else section
    return result


def with_overrides(values: Values, overrides: Overrides) -> Values:
    """The sections with the overrides applied."""
    for dotted, value in overrides:
        section, _, field = dotted.partition(".")
        values = merged(values, {section: {field: value}})
    return values


def explain_all(
    error: ValidationError,
    kind: type[BaseModel],
    values: Values,
    overrides: Overrides,
    where: str,
    known: Sequence[str],
) -> str:
    """One line for all errors of a configuration: the first few, and the number of the others.

    Args:
        error: of `kind`, validated with the overrides.
        kind: the class of the configuration.
        values: the sections of the file.
        overrides: the flags of the command line.
        where: names the file, as the beginning of a message.
        known: the names of sections and fields.
    """
    items, given = error.errors(), {name for name, _ in overrides}
    in_file, in_flags = [], []
    texts_of_file = _texts(kind, values, known) if overrides else []
    for item in items[:MOST_PROBLEMS]:
        text = explain(item, known)
        if ".".join(str(part) for part in item["loc"][:2]) in given:
            in_flags.append(f"--{text}")
        elif not overrides or text in texts_of_file:
            in_file.append(text)
        else:
            in_flags.append(f"with {' '.join(_causes(text, kind, values, overrides, known))}: {text}")
    others = len(items) - len(in_file) - len(in_flags)
    parts = [*([f"{where}{'; '.join(in_file)}"] if in_file else []), *in_flags]
    return "; ".join([*parts, *([f"and {others} more"] if others else [])])


def _causes(text: str, kind: type[BaseModel], values: Values, overrides: Overrides, known: Sequence[str]) -> list[str]:
    """The flags without which a problem would not be there; all of them if there is no such flag."""
    flags = [f"--{name}={value if isinstance(value, str) else shown(value)}" for name, value in overrides]
    causes = []
    for index, flag in enumerate(flags):
        others = [*overrides[:index], *overrides[index + 1 :]]
        if text not in _texts(kind, with_overrides(values, others), known):
            causes.append(flag)
    return causes or flags


def _texts(kind: type[BaseModel], values: Values, known: Sequence[str]) -> list[str]:
    """The problems of a configuration."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return [explain(item, known) for item in error.errors()]
    return []


def explain(item: ErrorDetails, known: Sequence[str]) -> str:
    """One line for one of pydantic's errors."""
    dotted = ".".join(str(part) for part in item["loc"])[:MOST_SHOWN]
    if item["type"] == "extra_forbidden":
        return f"unknown key {dotted}{nearest(dotted, known)}"
    if item["type"] == "missing":
        return f"{dotted} is missing; give it in the config file or as --{dotted}=..."
    text = item["msg"].removeprefix("Value error, ")
    if not dotted:
        return text
    message = text[0].lower() + text[1:]
    return f"{dotted} = {shown(item['input'])}: {message}"


def shown(value: Any) -> str:
    """A value in a message: at most 80 characters; Python refuses to print integers of more than 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
