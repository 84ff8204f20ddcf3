"""Questions from the Hugging Face hub, by id or by the short name of a set that the paper uses."""

import re
from dataclasses import dataclass, replace
from typing import Any

from expo.data.files import python_rows
from expo.data.layouts import DEFAULT_OPTIONS, ReadOptions, Table, columns_to_read
from expo.errors import ConfigError, HubError

ROWS_PER_BATCH = 10_000
SYNTAX = "owner/name[/configuration][:split][@revision]"

_SOURCE = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<configuration>[\w.-]+))?(?::(?P<split>[^@]+))?(?:@(?P<revision>.+))?"
)


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the hub; None stands for the only configuration or split, and the newest revision."""

    id: str
    configuration: str | None = None
    split: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        marked = (("/", self.configuration), (":", self.split), ("@", self.revision))
        return self.id + "".join(f"{mark}{part}" for mark, part in marked if part)


@dataclass(frozen=True)
class NamedSet:
    """A set of the paper on the hub, with its expected numbers of rows and questions."""

    source: HubSource
    num_rows: int
    num_distinct: int
    """Questions with distinct texts."""


def _named(source: str, num_rows: int, num_distinct: int | None = None) -> NamedSet:
    parsed = parse_hub_source(source)
    assert parsed is not None
    return NamedSet(parsed, num_rows, num_distinct or num_rows)


def parse_hub_source(source: str) -> HubSource | None:
    """Parses "owner/name[/configuration][:split][@revision]"; None if the text has another form."""
    match = _SOURCE.fullmatch(source)
    return HubSource(**match.groupdict()) if match and not source.startswith(".") else None


NAMED = {
    # open-r1's copy of dapo-17k-raw, with each text once
    "dapo-17k": _named("open-r1/DAPO-Math-17k-Processed/all:train", 17_398),
    # as its authors published it (arXiv 2503.14476)
    "dapo-17k-raw": _named("BytedTsinghua-SIA/DAPO-Math-17k:train", 1_791_700, 17_398),
    "aime-2024": _named("HuggingFaceH4/aime_2024:train", 30),
    "aime-2025": _named("math-ai/aime25:test", 30),
    "math-500": _named("HuggingFaceH4/MATH-500:test", 500),
    "minerva": _named("math-ai/minervamath:test", 272),
    "olympiadbench": _named("math-ai/olympiadbench:test", 674),
    "amc": _named("math-ai/amc23:test", 40),
    "amc-83": _named("AI-MO/aimo-validation-amc:train", 83),
}
"""The paper's training set and benchmarks by short name. Papers report AMC on either amc or amc-83."""


def find_named(source: str) -> NamedSet | None:
    """The set with that short name, which may end in "@revision"; None if there is none."""
    name, _, revision = source.partition("@")
    named = NAMED.get(name)
    return replace(named, source=replace(named.source, revision=revision)) if named and revision else named


def hub_table(source: HubSource, options: ReadOptions = DEFAULT_OPTIONS) -> Table:
    """The rows of a split, downloaded or from the cache of the hub's library, with only the columns that are used.

    Raises: ConfigError if the split cannot be loaded, the source has several splits and names none, or no layout fits
        its columns.
    """
    split = _load_split(source)
    wanted = columns_to_read(str(source), split.column_names, options)
    batches = split.select_columns(wanted).with_format("arrow").iter(batch_size=ROWS_PER_BATCH)
    unread = tuple(column for column in split.column_names if column not in wanted)
    return Table(str(source), enumerate((row for batch in batches for row in python_rows(batch)), 1), unread=unread)


def _load_split(source: HubSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} is on the Hugging Face hub, which needs datasets; install expo-rl[train]"
        ) from error
    try:
        loaded = datasets.load_dataset(source.id, source.configuration, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HubError(
            f"cannot load {source} from the Hugging Face hub: {reason}; check {SYNTAX} and the network, or give a "
            f"downloaded JSON-lines or Parquet file"
        ) from error
    if source.split is not None:
        return loaded
    if len(loaded) != 1:
        raise ConfigError(
            f"{source} has the splits {', '.join(loaded)}; say which, as in {source.id}:{next(iter(loaded))}"
        )
    return next(iter(loaded.values()))
