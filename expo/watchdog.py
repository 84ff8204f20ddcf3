"""Deadlines on everything that can wait for ever: at expiry the stacks are dumped and no process of the rank stays.

A thread of its own watches, so that a collective that never returns, a generation that never ends or a disk that does
not answer is noticed all the same.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_CODE = 75  # sysexits.h, EX_TEMPFAIL: trying again may help
SIBLING_GRACE_S = 3.0  # for the other ranks of this machine to write down their own stacks


class Watchdog:
    """Ends this process, and the ranks beside it, when a phase takes longer than it may.

    Args:
        rank: number that reports carry.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.siblings: Sequence[int] = ()  # process ids of the ranks on this machine
        self.folder: Path | None = None  # where stacks are written besides stderr
        self._phases: list[tuple[str, float, float]] = []  # name, seconds allowed, time of expiry
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """The block must end within `seconds`; an error that leaves it is noted with the phase's name."""
        with self._changed:
            self._phases.append((name, seconds, time.monotonic() + seconds))
            self._changed.notify()
        try:
            yield
        except Exception as error:
            error.add_note(f"rank {self.rank}, phase {name}")
            raise
        finally:
            with self._changed:
                self._phases.pop()

    def _watch(self) -> None:
        while True:
            with self._changed:
                left = min((expiry for _, _, expiry in self._phases), default=float("inf")) - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                name, seconds, _ = min(self._phases, key=lambda phase: phase[2])
            self._expire(name, seconds)

    def _expire(self, name: str, seconds: float) -> None:
        headline = (
            f"rank {self.rank}: phase {name} took longer than deadline.{name} = {seconds:g} s; this rank ends now. "
            f"Where every thread stands is below; raise the deadline if this was only slow, then go on with --resume"
        )
        sys.stderr.write(headline + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self.folder is not None:
            with suppress(OSError), (self.folder / f"stacks-rank{self.rank}.txt").open("w") as file:
                file.write(headline + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        for child in multiprocessing.active_children():
            child.kill()
        siblings = [process for process in self.siblings if process != os.getpid()]
        expiry = time.monotonic() + SIBLING_GRACE_S
        while time.monotonic() < expiry and any(_is_alive(process) for process in siblings):
            time.sleep(0.1)
        for process in siblings:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        os._exit(EXIT_CODE)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
