"""Progress on the console: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from expo.runtime.stdout import Stdout, raise_output_error

PLAIN_WIDTH = 80  # columns of a line that does not go to a terminal, such as a log's
BAR_FROM = 100  # columns of a terminal from which a bar is shown beside a note
GAP = "  "


class Note(NamedTuple):
    """What a progress line says of a unit: alarms, which are always said, and metrics, the most important first.

    Metrics that do not fit into the line are left out from the end; none is cut in the middle.
    """

    alarms: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def fitted(self, width: int) -> str:
        """The alarms, and as many metrics as fit into `width` columns with them."""
        shown = list(self.alarms)
        for metric in self.metrics:
            if len(GAP.join([*shown, metric])) > width:
                break
            shown.append(metric)
        return GAP.join(shown)


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
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            _Bar(self._console),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            _NoteColumn(table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal, expand=True) as progress:
            task = progress.add_task(name, total=total, completed=done, note=Note())
            yield Bar(self, progress, task, name, total, done)


class _Bar(BarColumn):
    """A bar of 12 columns; on a narrow terminal it leaves them to the note."""

    def __init__(self, console: Console) -> None:
        super().__init__(bar_width=12)
        self._console = console

    def render(self, task: Task) -> Any:
        """The bar, or nothing."""
        is_left_out = task.fields["note"] != Note() and self._console.width < BAR_FROM
        return Text("") if is_left_out else super().render(task)


class _NoteColumn(ProgressColumn):
    """The note, fitted into the remaining width."""

    def render(self, task: Task) -> "_FittedNote":
        """The note of a task."""
        return _FittedNote(task.fields["note"])


class _FittedNote(NamedTuple):
    note: Note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.note.fitted(options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, options.max_width)


def printable(text: str, most: int | None = None, keep: str = "") -> str:
    """A text that a terminal shows and does not obey: control and other invisible characters are escaped.

    Args:
        text: any text, such as a reply.
        most: characters that are kept of a longer text, from its beginning and its end; None: all.
        keep: invisible characters that stay, such as a line break.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


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

    def advance(self, count: int = 1, note: Note = Note()) -> None:  # noqa: B008 (immutable)
        """Adds `count` finished units, and shows the note."""
        previous, self._done = self._done, self._done + count
        self._progress.update(self._task, completed=self._done, note=note)
        passes_tenth = 10 * previous // self._total < 10 * self._done // self._total
        if self._progress.disable and (note != Note() or passes_tenth):
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
            counted, time_left = f"{self._name} {self._done}/{self._total}", f"{left:.0f} s left"
            width = PLAIN_WIDTH - len(counted) - len(time_left) - 2 * len(GAP)
            self._display.line(GAP.join(filter(None, (counted, note.fitted(width), time_left))))
