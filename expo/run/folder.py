"""The folder of a run and its files."""

import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from expo.errors import ConfigError
from expo.reporting.reader import starts_of
from expo.run.environment import ENVIRONMENT, describe_environment
from expo.runtime.atomic_io import write_bytes_whole


class RunFolder:
    """The files of a run; every line is flushed as it is written, every other file written whole.

    Args:
        path: the folder, made if need be.
        is_writer: whether this rank writes; on the others, what would write does nothing.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self._is_writer = path, is_writer
        self._lock: IO[str] | None = None
        if is_writer:
            path.mkdir(parents=True, exist_ok=True)

    def take(self) -> None:
        """Keeps other processes from writing here until `release`, or until this one ends in whatever way.

        Raises: ConfigError if one is at it.
        """
        if not self._is_writer:
            return
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is at work in run.dir = {self.path}; end it first, or choose another folder"
            ) from error

    def release(self) -> None:
        """Lets others write here again."""
        if self._lock is not None:
            self._lock.close()

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Adds lines to `<name>.jsonl`."""
        if not self._is_writer:
            return
        with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json_lines(rows))

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole."""
        if self._is_writer:
            write_bytes_whole(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one JSON file whole."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON file that `write_json` wrote."""
        value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return value

    def record_start(self, first_step: int, num_ranks: int) -> None:
        """Adds to environment.json from what the run goes on, and with which step; what it was made of before stays."""
        if not self._is_writer:
            return
        path = self.path / ENVIRONMENT
        earlier = starts_of(self.read_json(ENVIRONMENT)) if path.exists() else []
        start = {**describe_environment(), "ranks": num_ranks, "first_step": first_step}
        self.write_json(ENVIRONMENT, {"starts": [*earlier, start]})

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of `<name>.jsonl`; a last line that was cut short is left out."""
        path = self.path / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind(self, step: int) -> None:
        """Drops what was written after `step`: a resumed run writes it again."""
        for path in self.path.glob("*.jsonl"):
            rows = [row for row in self.read_rows(path.stem) if row["step"] <= step]
            self.write_text(path.name, _json_lines(rows))


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
