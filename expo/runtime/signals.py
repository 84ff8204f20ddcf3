"""Requests to stop: SIGTERM, SIGUSR1 or a time limit, which a run checks where it can save and be resumed."""

import os
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
        save_by_minutes: time limit in minutes from now; None: none.
    """

    _parent: int | None = None  # whose end is a request to stop

    def __init__(self, save_by_minutes: float | None = None) -> None:
        self._deadline = None if save_by_minutes is None else time.monotonic() + 60 * save_by_minutes
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        """The signal or setting that requested a stop; None if there was no request."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "run.save_by_minutes"
        if self._parent is not None and os.getppid() != self._parent:
            return "the end of its launcher"
        return None

    def end_with_parent(self) -> None:
        """Makes the end of the process that started this one a request to stop."""
        self._parent = os.getppid()

    def check(self) -> None:
        """Raises StopRequested if this process has been asked to stop."""
        if self.reason is not None:
            raise StopRequested(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Records the signals while inside, in place of ending the process; has no effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._record) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
