"""Requests to stop: Ctrl-C, SIGTERM, SIGUSR1 or a time limit, which a run checks where it can save and be resumed."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from expo.errors import INTERRUPT_EXIT_CODE, Interrupted, OutputError, StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEATED_S = 0.3  # a launcher may pass on a Ctrl-C that the terminal has sent to the rank, too
CLOSED_STDOUT = "closed stdout"  # a reason to stop
SHOW_CURSOR = b"\033[?25h"  # a progress bar hides it


class StopSwitch:
    """Whether this process has been asked to stop.

    Args:
        save_by_minutes: time limit in minutes from now; None: none.
        on_interrupt: what this process does after Ctrl-C, shown at once on stderr.
    """

    _parent: int | None = None  # whose end is a request to stop

    def __init__(self, save_by_minutes: float | None = None, on_interrupt: str = "saving, then ending") -> None:
        self._deadline = None if save_by_minutes is None else time.monotonic() + 60 * save_by_minutes
        self._reason: str | None = None
        self._on_interrupt = on_interrupt

    @property
    def reason(self) -> str | None:
        """The signal or setting that requested a stop; None if there was no request."""
        if self._reason is not None:
            return self._reason
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "run.save_by_minutes"
        if self._parent is not None and os.getppid() != self._parent:
            return "the end of its launcher"
        return None

    def end_with_parent(self) -> None:
        """Makes the end of the process that started this one a request to stop."""
        self._parent = os.getppid()

    def request(self, reason: str) -> None:
        """Asks this process to stop."""
        self._reason = reason

    def check(self) -> None:
        """Raises StopRequested if this process has been asked to stop."""
        if self.reason is not None:
            raise StopRequested(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Records the signals while inside, in place of ending the process; has no effect outside the main thread.

        The second Ctrl-C ends the process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._record) for number in SIGNALS}
        try:
            with self._interrupts_seen_at_once():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    @contextmanager
    def _interrupts_seen_at_once(self) -> Iterator[None]:
        """Answers each Ctrl-C from another thread: Python's own handlers run in the main thread alone, which may be
        inside a long computation or a collective.
        """
        received, written = socket.socketpair()
        written.setblocking(False)
        previous = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(received,), name="interrupts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            written.close()
            thread.join()
            received.close()

    def _watch(self, received: socket.socket) -> None:
        first = None
        while numbers := received.recv(16):
            for number in numbers:
                if number != signal.SIGINT:
                    continue
                if first is None:
                    first = time.monotonic()
                    _say(f"Ctrl-C: {self._on_interrupt}; press Ctrl-C again to end at once without saving\n")
                elif time.monotonic() - first > REPEATED_S:
                    _say("Ctrl-C again: ended at once\n")
                    if os.isatty(2):
                        os.write(2, SHOW_CURSOR)
                    os._exit(INTERRUPT_EXIT_CODE)


def raise_reason(reason: str | None, text: str) -> None:
    """Raises an error with the text if the reason for a stop is one that the exit code tells.

    Raises:
        Interrupted: after Ctrl-C.
        OutputError: if stdout could not be written.
    """
    if reason == signal.SIGINT.name:
        raise Interrupted(text)
    if reason == CLOSED_STDOUT:
        raise OutputError(f"stdout cannot be written: {text}")


def _say(text: str) -> None:
    """Writes to stderr past Python's buffers, which the main thread may hold; from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())
