"""Writing to stdout, which may be closed or on a full disk."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from expo.errors import OutputError


class Stdout:
    """The present sys.stdout; calls `on_closed` in place of the first error, and writes nothing afterwards."""

    def __init__(self, on_closed: Callable[[str], None]) -> None:
        self._on_closed = on_closed

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":
            raise AttributeError(name)  # rich would bypass this object
        return getattr(_stdout(), name)

    def write(self, text: str) -> int:
        """Writes a text."""
        return self._attempt(lambda: _stdout().write(text)) or 0

    def flush(self) -> None:
        """Flushes what was written."""
        self._attempt(lambda: _stdout().flush())

    def _attempt(self, call: Callable[[], int | None]) -> int | None:
        try:
            return call()
        except (OSError, ValueError) as error:  # ValueError: Python's own file is closed
            discard_stdout()
            self._on_closed(_reason(error))
            return None


def _stdout() -> IO[str]:
    # while rich shows a progress bar, sys.stdout is its own object, which prints above the bar
    file: IO[str] = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return file


def write_stdout(text: str) -> None:
    """Writes a text to stdout. Raises: OutputError if that is not possible."""
    stdout = Stdout(raise_output_error)
    stdout.write(text)
    stdout.flush()


def discard_stdout() -> None:
    """Has everything written to stdout discarded from now on, also what is still buffered when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout().fileno())
        _stdout().flush()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def raise_output_error(reason: str) -> None:
    """Raises: OutputError."""
    raise OutputError(f"stdout cannot be written ({reason})")
