"""Loads questions from a source, by its name:

- questions.jsonl, questions.parquet: a local file; `layouts.py` knows the columns
- some/folder: all such files of a folder
- owner/name[/configuration][:split][@revision]: a data set on the Hugging Face hub
- dapo-17k, aime-2024, math-500, ...: a set of the paper on the hub (`hub.NAMED`); its number of rows is checked
- reasoning-gym:chain_sum?level=1&size=500&seed=0: generated
- ledger:train, ledger:held_out, ledger:beyond: the embedded task
- arithmetic:train, arithmetic:held_out: one-digit sums and differences
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from expo import ledger
from expo.data import arithmetic
from expo.data.files import SUFFIXES, local_tables
from expo.data.hub import NAMED, NamedSet, find_named, hub_table, parse_hub_source
from expo.data.layouts import DEFAULT_OPTIONS, ReadOptions, TableReader
from expo.data.questions import QuestionSet, Row, merge_rows
from expo.data.reasoning import PREFIX, reasoning_rows
from expo.errors import ConfigError

BUILT_IN: dict[str, Callable[[], list[ledger.LedgerQuestion]]] = {
    "ledger:train": partial(ledger.train_questions, seed=0),
    "ledger:held_out": ledger.held_out_questions,
    "ledger:beyond": ledger.beyond_questions,
    "arithmetic:train": arithmetic.train_questions,
    "arithmetic:held_out": arithmetic.held_out_questions,
}
"""Built-in question sets by name."""


def load_questions(source: str, options: ReadOptions = DEFAULT_OPTIONS) -> QuestionSet:
    """The distinct questions of a source; `options` say how the rows of tables are read.

    Raises: ConfigError if the source does not exist, cannot be read or is empty, if a row (which it names) is not a
        question, or if a named set does not have the expected number of rows.
    """
    named = find_named(source)
    reader = TableReader(options)
    if named is not None:
        loaded = _load_named(source, named, reader, options)
    else:
        loaded = merge_rows(source, _rows_of(source, reader, options))
    return replace(loaded, unread_columns=tuple(reader.unread))


def _load_named(source: str, named: NamedSet, reader: TableReader, options: ReadOptions) -> QuestionSet:
    options = replace(options, needs_columns=False)  # their layouts are known
    loaded = merge_rows(source, reader.rows(hub_table(named.source, options)))
    if loaded.num_rows != named.num_rows:
        raise ConfigError(
            f"{source} is {named.source} with {named.num_rows:,} rows, but {loaded.num_rows:,} were found: the "
            f"set has changed; to use it as it is, name it {named.source}"
        )
    num_distinct = loaded.num_rows - loaded.num_duplicates
    if num_distinct == named.num_distinct:
        return loaded
    note = f"{num_distinct:,} questions of different text were found, {named.num_distinct:,} expected"
    return replace(loaded, notes=(*loaded.notes, note))


def _exists(source: str) -> bool:
    """Whether a source is a file or folder. Raises: ConfigError if it cannot be one: too long a name, for instance."""
    try:
        Path(source).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the source {source[:80]!r} cannot be read ({reason}); give another file or name") from error
    return True


def _rows_of(source: str, reader: TableReader, options: ReadOptions) -> Iterator[Row]:
    if source in BUILT_IN:
        return (Row(source, q.question, q.answer, level=q.level) for q in BUILT_IN[source]())
    if source.startswith(PREFIX):
        return reasoning_rows(source)
    if _exists(source) or source.endswith(SUFFIXES):
        return chain.from_iterable(map(reader.rows, local_tables(Path(source), options)))
    on_hub = parse_hub_source(source)
    if on_hub is not None:
        return reader.rows(hub_table(on_hub, options))
    names = [*BUILT_IN, *NAMED]
    near = difflib.get_close_matches(source, names, n=1)
    raise ConfigError(
        f"there is no file or folder {source}{f'; did you mean {near[0]}?' if near else ''}; give JSON lines or "
        f"Parquet, a folder of them, a hub id, {PREFIX}FAMILY, or one of {', '.join(names)}"
    )
