"""Local tables of questions: JSON lines, Parquet, or a folder of them."""

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from expo.data.layouts import ReadOptions, Record, Table, columns_to_read
from expo.errors import ConfigError, first_line

SUFFIXES = (".jsonl", ".parquet")
ROWS_PER_BATCH = 10_000  # of a Parquet file: about 10 MB of questions


def local_tables(path: Path, options: ReadOptions) -> Iterator[Table]:
    """The table in a file, or the tables of the files in a folder, sorted by name.

    Raises: ConfigError if a folder has no JSON-lines or Parquet files.
    """
    paths = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"the folder {path} holds no {' or '.join(SUFFIXES)} files; give another folder, or a file")
    for file in paths:
        if file.suffix == ".parquet":
            yield _parquet_table(file, options)
        else:
            yield Table(str(file), _json_records(file), keeps_ids=True)


def _json_records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # a byte order mark, which some editors write, is no text
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(f"{path}:{number}", line)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"cannot read the question file {path}: {reason}; give JSON lines or Parquet") from error


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


# decimals keep the digits they are written with
_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_not_a_number)


def _parse(where: str, line: str) -> Record:
    try:
        record = _DECODER.decode(line.strip())
        if "\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False, default=str).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error.msg}); expected one object a line") from error
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} has half of a surrogate pair ({error.object[error.start]!a}); correct it"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; expected one object of texts and numbers a line") from error
    except ValueError as error:  # NaN, Infinity; Python reads no number of more than 4,300 digits
        raise ConfigError(f"{where} has a number that cannot be read: {error}; write it as text, or drop it") from error
    if not isinstance(record, dict):
        raise ConfigError(f'{where} is not an object; expected {{"question": "...", "answer": "..."}}')
    return record


def _parquet_table(path: Path, options: ReadOptions) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow; install expo-rl[train]") from error

    def refuse(error: Exception) -> NoReturn:
        raise ConfigError(f"cannot read the question file {path}: {first_line(error)}") from error

    def records(wanted: list[str]) -> Iterator[tuple[int, Record]]:
        try:
            with parquet.ParquetFile(path) as file:
                batches = file.iter_batches(batch_size=ROWS_PER_BATCH, columns=wanted)
                yield from enumerate((record for batch in batches for record in python_rows(batch)), 1)
        except (OSError, pyarrow.ArrowException) as error:
            refuse(error)

    try:
        columns = parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        refuse(error)
    wanted = columns_to_read(str(path), columns, options)
    unread = tuple(column for column in columns if column not in wanted)
    return Table(str(path), records(wanted), keeps_ids=True, unread=unread)


# --- Arrow's values


def python_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow batch; a float32 0.1 is 0.1, not the 0.10000000149011612 that its bits are in float64."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    converters = {field.name: convert for field in batch.schema if (convert := _converter(field.type)) is not None}
    for row in rows if converters else ():
        row.update({name: convert(row[name]) for name, convert in converters.items()})
    return rows


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """The function that gives the narrow floats in a value of an Arrow type the shortest decimals that round to them;
    None if the type has none.
    """
    narrow: Any = {"float": np.float32, "halffloat": np.float16}.get(str(kind))
    if narrow is not None:
        return lambda value: None if value is None else float(str(narrow(value)))
    if str(kind).startswith("struct<"):
        members = {field.name: convert for field in kind if (convert := _converter(field.type)) is not None}
        if not members:
            return None
        return lambda value: value and {**value, **{name: convert(value[name]) for name, convert in members.items()}}
    inner = _converter(kind.value_type) if "list<" in str(kind).split("[")[0] else None
    return None if inner is None else lambda value: value and [inner(member) for member in value]
