"""Progress on the console: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from expo.runtime.stdout import Stdout, raise_output_error


class Display:
    """The console of a run: a live progress bar on a terminal, plain lines elsewhere; silent unless `is_shown`.

    Args:
        is_shown: whether anything is written.
        on_closed: called once if stdout cannot be written, with the reason; nothing is written afterwards.
    """

    def __init__(self, *, is_shown: bool = True, on_closed: Callable[[str], None] | None = None) -> None:
        # rich would end the process at a closed pipe
        self._console = Console(quiet=not is_shown, file=cast("IO[str]", Stdout(on_closed or raise_output_error)))

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A progress bar that is shown until the end of the block."""
        # the note gets the remaining width, and is cut if it is too long
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal, expand=True) as progress:
            task = progress.add_task(name, total=total, completed=done, note="")
            yield Bar(self, progress, task, name, total, done)


class Bar:
    """Progress of one job. Without a terminal it prints a line for each note, or else for each tenth of the job."""

    def __init__(self, display: Display, progress: Progress, task: Any, name: str, total: int, done: int) -> None:
        self._display = display
        self._progress = progress
        self._task = task
        self._name = name
        self._total = total
        self._done = done
        self._started = time.perf_counter()
        self._first = done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` finished units, and shows the note."""
        previous, self._done = self._done, self._done + count
        self._progress.update(self._task, completed=self._done, note=note)
        passes_tenth = 10 * previous // self._total < 10 * self._done // self._total
        if self._progress.disable and (note or passes_tenth):
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
            self._display.line(f"{self._name} {self._done}/{self._total}  {note}  {elapsed:.0f} s, {left:.0f} s left")
