"""The protocol of a run or of an evaluation, so that another model is evaluated by it: `--like RUN`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.config import EvalConfig, RunConfig
from expo.errors import ConfigError
from expo.evaluation.protocol import PROTOCOL, PROTOCOL_FIELDS, QUESTION_FIELDS, RESULTS, differences
from expo.run.logs import parse_object
from expo.runtime.cli import sections_of
from expo.runtime.config_errors import Overrides

FIELDS = (*PROTOCOL_FIELDS.values(), *QUESTION_FIELDS.values(), "evaluation.sets")
"""The fields that --like takes from a run or an evaluation: what the scores depend on, beside the model."""


@dataclass(frozen=True)
class Like:
    """A protocol to evaluate by.

    file: the configuration or the results that hold it; values: its fields by their dotted names, not validated if
    `file` holds results.
    """

    file: Path
    values: Mapping[str, Any]

    def sections(self) -> dict[str, dict[str, Any]]:
        """The values by section."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, field = name.split(".")
            sections.setdefault(section, {})[field] = value
        return sections

    def notes(self, config: EvalConfig, overrides: Overrides) -> tuple[str, ...]:
        """Where the protocol of an evaluation is from, and how its command line changed it, as lines of text.

        Args:
            config: of the evaluation.
            overrides: of its command line.
        """
        given = [name for name, _ in overrides if name in self.values]
        changed = differences(
            {name: _plain(self.values[name]) for name in given},
            {name: _plain(config.settings[name]) for name in given},
        )
        source = f"protocol: that of {self.file}"
        return (source, f"other than there: {', '.join(changed)}") if changed else (source,)


def _plain(value: Any) -> Any:
    """A value as JSON holds it; empty ones are equal to none."""
    return json.loads(json.dumps(value, default=str)) or (None if value in ({}, [], "") else value)


def like_run(file: Path, config: RunConfig) -> Like:
    """The protocol of a run's evaluations.

    Args:
        file: the run's configuration.
        config: its content.
    """
    values = {}
    for name in FIELDS:
        section, field = name.split(".")
        values[name] = getattr(getattr(config, section), field)
    return Like(file, values)


def like_evaluation(path: Path) -> Like:
    """The protocol of an evaluation, from its folder or one of the files there.

    Raises: ConfigError if there is none, or it is damaged.
    """
    file = _metadata_file(path)
    try:
        content = parse_object(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--like: {file} cannot be read ({error.strerror}); give another folder") from error
    protocol, questions = content.get("protocol"), content.get("questions")
    if not isinstance(protocol, dict) or not isinstance(questions, dict) or not questions:
        raise _damaged(file, "it has no protocol or no questions")
    values = {field: _value(protocol, name, field, file) for name, field in PROTOCOL_FIELDS.items()}
    metadata = list(questions.values())
    if not all(isinstance(of_set, dict) and isinstance(of_set.get("source"), str) for of_set in metadata):
        raise _damaged(file, "a set of questions has no source")
    values |= {field: _value(metadata[0], name, field, file) for name, field in QUESTION_FIELDS.items()}
    values["evaluation.sets"] = {name: of_set["source"] for name, of_set in questions.items()}
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _damaged(file, "it holds characters that no text has") from error
    return Like(file, values)


def _metadata_file(path: Path) -> Path:
    names = (RESULTS, PROTOCOL)
    try:
        candidates = [path] if path.name in names else [path / name for name in names]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
    except (OSError, ValueError):  # the name is too long, or a folder cannot be read
        found = None
    if found is None:
        raise ConfigError(
            f"--like = {path} is neither a run nor an evaluation; give the folder of a run (with config.yaml) or of an "
            f"evaluation (with {RESULTS})"
        )
    return found


def _value(record: Mapping[str, Any], name: str, field: str, file: Path) -> Any:
    """The recorded value, or the field's default where it is None: it was not set."""
    section, in_section = field.split(".")
    default = sections_of(EvalConfig)[section].model_fields[in_section].get_default(call_default_factory=True)
    value = record.get(name)
    if value is None and default:
        raise _damaged(file, f"{name} is missing")
    return default if value is None else value


def _damaged(file: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"--like: {file} is not what `python -m expo.evaluate` wrote: {problem}; give another evaluation or a run"
    )
