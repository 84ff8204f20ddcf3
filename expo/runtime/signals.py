"""Asked to stop: SIGTERM, SIGUSR1 or the time given to the run, noticed where a run can be left and taken up again."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from expo.errors import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSwitch:
    """Whether this process has been asked to stop.

    Args:
        save_by_minutes: minutes from now after which it counts as asked; None: never.
    """

    def __init__(self, save_by_minutes: float | None = None) -> None:
        self._deadline = None if save_by_minutes is None else time.monotonic() + 60 * save_by_minutes
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        """Who asked, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "run.save_by_minutes"
        return None

    def check(self) -> None:
        """Raises StopRequested if this process has been asked to stop."""
        if self.reason is not None:
            raise StopRequested(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes note of the signals while inside, instead of dying by them; outside the main thread it cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
