"""The logs of a run, one JSON object per line: their state at a checkpoint, and what of them a resumed run keeps.

A log only grows, so at a checkpoint it is described by its size and checksum. A run that resumes from the checkpoint
cuts the log there and writes the later lines again. If the log does not begin with what the checkpoint describes, lines
were lost or changed; those that can still be read are kept.
"""

import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

LOGS = ("metrics", "completions", "curriculum", "evaluations")  # .jsonl
ONE_ROW_PER_STEP = ("metrics", "curriculum", "evaluations")


class LogState(NamedTuple):
    """Lines, bytes and CRC-32 of a log."""

    lines: int = 0
    size: int = 0
    crc: int = 0

    def extended(self, content: bytes) -> "LogState":
        """The state after `content` was appended."""
        return LogState(self.lines + content.count(b"\n"), self.size + len(content), zlib.crc32(content, self.crc))

    def begins(self, content: bytes) -> bool:
        """Whether `content` begins with the log of this state."""
        return len(content) >= self.size and zlib.crc32(content[: self.size]) == self.crc


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text; empty if there is none. No text raises an error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, numbers of 5,000 digits; brackets nested too deep
        return {}
    return value if isinstance(value, dict) else {}


def parse_row(line: str | bytes) -> dict[str, Any]:
    """The row in a line of a log; empty if the line is not one."""
    row = parse_object(line)
    return row if type(row.get("step")) is int else {}


def rows_up_to(content: bytes, step: int) -> Iterator[tuple[int, bytes]]:
    """Step and line of each whole row, up to `step`; an incomplete last line is left out."""
    for line in content.split(b"\n")[:-1]:
        row = parse_row(line)
        if row and row["step"] <= step:
            yield row["step"], line + b"\n"


def cut(name: str, content: bytes, step: int, saved: LogState | None) -> tuple[bytes, str | None]:
    """What a run that resumes after `step` keeps of a log.

    Args:
        name: of the log.
        content: of the log.
        step: of the checkpoint; -1 without one.
        saved: the log's state that the checkpoint recorded, None if it recorded none.

    Returns: the new content; and a message if lines of the old one were lost or changed.
    """
    if saved is not None and saved.begins(content):
        return content[: saved.size], None
    rows = list(rows_up_to(content, step))
    if saved is None:
        return b"".join(line for _, line in rows), None
    lines = list(dict(rows).values()) if name in ONE_ROW_PER_STEP else [line for _, line in rows]
    return b"".join(lines), (
        f"warning: {name}.jsonl is not as the checkpoint of step {step} recorded it; "
        f"{len(lines)} of its {saved.lines} lines can be read and are kept"
    )
