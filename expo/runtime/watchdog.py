"""Deadlines for phases that could hang: at expiry the stacks are dumped and all processes of the rank are killed.

While a run starts, a rank on the same machine that has died ends this rank too, and is named: with NCCL this one would
wait for it until the launcher kills it.

A separate thread watches, so it also catches a collective that never returns, a generation that never ends and a disk
that does not respond.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from expo.errors import DEADLINE_EXIT_CODE

SIBLING_GRACE_S = 3.0  # for the other ranks on this machine to dump their own stacks
LOST_RANK_S = 10.0  # for an error of the collective that waits for it; torchrun kills the other ranks after 30 s
CHECK_S = 0.5  # between looks for ranks that have died
START = "start"  # the phase in which no rank ends before the others
BACKSTOP_S = 8.0  # after the deadline; the watching thread needs at most twice SIBLING_GRACE_S


class Watchdog:
    """Ends this process and the other ranks on this machine when a phase exceeds its deadline.

    Args:
        rank: named in reports.
        go_on: how to continue once the deadline was raised, for the report.
    """

    def __init__(self, rank: int = 0, go_on: str = "continue with --resume") -> None:
        self.rank, self._go_on = rank, go_on
        self.siblings: Mapping[int, int] = {}  # process ids of the ranks on this machine, by rank
        self.folder: Path | None = None  # stacks are written there too, besides stderr
        self._phases: list[tuple[str, float, float]] = []  # name, seconds allowed, time of expiry
        self._lost: tuple[int, float] | None = None  # a rank that has died, and when that was seen
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """The block must end within `seconds`. An exception raised in it gets a note with rank and phase."""
        with self._changed:
            self._phases.append((name, seconds, time.monotonic() + seconds))
            self._changed.notify()
            self._arm()
        try:
            yield
        except Exception as error:
            error.add_note(f"rank {self.rank}, phase {name}")
            raise
        finally:
            with self._changed:
                self._phases.pop()
                self._arm()

    def _arm(self) -> None:
        """Sets the interpreter's own timer as a backstop: code that never releases the GIL, such as a runaway regular
        expression, keeps the watching thread from running. The timer dumps the stacks and ends this process.
        """
        faulthandler.cancel_dump_traceback_later()
        if self._phases:
            left = min(expiry for _, _, expiry in self._phases) - time.monotonic()
            faulthandler.dump_traceback_later(max(left, 0.0) + BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)

    def watch_ranks(self, processes: Mapping[int, int]) -> None:
        """Sets the process ids of the ranks on this machine, by rank; those that die in phase start are named."""
        with self._changed:
            self.siblings = dict(processes)
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                left = min((expiry for _, _, expiry in self._phases), default=float("inf")) - time.monotonic()
                is_starting = len(self.siblings) > 1 and any(name == START for name, _, _ in self._phases)
                if left > 0 and not (is_starting and self._has_lost_a_rank()):
                    self._changed.wait(min(left, CHECK_S if is_starting else threading.TIMEOUT_MAX))
                    continue
                name, seconds, _ = min(self._phases, key=lambda phase: phase[2])
            if left <= 0:
                self._end(
                    f"rank {self.rank}: phase {name} took longer than deadline.{name} = {seconds:g} s; this rank is "
                    f"ended. The stacks of all threads follow. If the phase was only slow, raise the deadline; then "
                    f"{self._go_on}",
                    DEADLINE_EXIT_CODE,
                )
            assert self._lost is not None
            lost = self._lost[0]
            self._end(
                f"rank {self.rank}: rank {lost} (process {self.siblings[lost]}) has died in phase {START}; this rank "
                f"is ended. The stacks of all threads follow. See the output of rank {lost}; then {self._go_on}",
                1,
            )

    def _has_lost_a_rank(self) -> bool:
        """Whether a rank on this machine has died, and this one had time to end by itself."""
        if self._lost is None:
            gone = [rank for rank, process in sorted(self.siblings.items()) if not is_running(process)]
            self._lost = (gone[0], time.monotonic()) if gone else None
        return self._lost is not None and time.monotonic() - self._lost[1] > LOST_RANK_S

    def _end(self, headline: str, exit_code: int) -> None:
        # in a thread: writing to a closed stderr or to a disk that does not respond may block
        report = threading.Thread(target=self._report, args=(headline,), daemon=True)
        report.start()
        report.join(SIBLING_GRACE_S)
        siblings = [process for process in self.siblings.values() if process != os.getpid()]
        expiry = time.monotonic() + SIBLING_GRACE_S
        while time.monotonic() < expiry and any(is_running(process) for process in siblings):
            time.sleep(0.1)
        children = [child for process in [*siblings, os.getpid()] for child in _descendants(process)]
        for process in [*siblings, *children]:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        os._exit(exit_code)

    def _report(self, headline: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(headline + "\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self.folder is not None:
            with suppress(OSError), (self.folder / f"stacks-rank{self.rank}.txt").open("w") as file:
                file.write(headline + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)


def is_running(process: int) -> bool:
    """Whether a process exists and has not ended; one that its parent has not waited for yet has ended."""
    with suppress(OSError):
        return _state_and_parent(process)[0] not in "ZX"
    try:
        os.kill(process, 0)  # where the system has no /proc
    except ProcessLookupError:
        return False
    return True


def _state_and_parent(process: int) -> tuple[str, int]:
    """The state and the parent of a process, from Linux's /proc. Raises: OSError."""
    # "pid (name) state parent ...", where the name may contain any character
    state, parent, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return state, int(parent)


def _descendants(process: int) -> list[int]:
    """Process ids of all descendants; none where the system has no /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        child = int(path.parent.name)
        with suppress(OSError):
            parents[child] = _state_and_parent(child)[1]
    processes = [process]
    for ancestor in processes:
        processes += [child for child, parent in parents.items() if parent == ancestor]
    return processes[1:]
