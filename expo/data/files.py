"""Local tables of questions: JSON lines, Parquet, or a folder of them."""

import json
from collections.abc import Iterator
from pathlib import Path

from expo.data.layouts import Record, Table, columns_to_read
from expo.errors import ConfigError

SUFFIXES = (".jsonl", ".parquet")
ROWS_PER_BATCH = 10_000  # of a Parquet file: about 10 MB of questions


def local_tables(path: Path) -> Iterator[Table]:
    """The table in a file, or the tables of the files in a folder, sorted by name.

    Raises: ConfigError if a folder has no JSON-lines or Parquet files.
    """
    paths = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"the folder {path} holds no {' or '.join(SUFFIXES)} files; give another folder, or a file")
    for file in paths:
        records = _parquet_records(file) if file.suffix == ".parquet" else _json_records(file)
        yield Table(str(file), records, keeps_ids=True)


def _json_records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(f"{path}:{number}", line)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"cannot read the question file {path}: {reason}; give JSON lines or Parquet") from error


def _parse(where: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error.msg}); expected one object a line") from error
    if not isinstance(record, dict):
        raise ConfigError(f'{where} is not an object; expected {{"question": "...", "answer": "..."}}')
    return record


def _parquet_records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow; install expo-rl[train]") from error
    try:
        with parquet.ParquetFile(path) as file:
            wanted = columns_to_read(str(path), file.schema_arrow.names)
            batches = file.iter_batches(batch_size=ROWS_PER_BATCH, columns=wanted)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"cannot read the question file {path}: {str(error).splitlines()[0]}") from error
