"""Processes that grade one pair at a time, and are killed when they take too long.

An answer such as `9^{9^{9}}` can hang computer algebra for hours or fill the memory, and only killing the process ends
that. The deadline is kept here, by the wall clock; an overdue worker is killed and replaced. What runs inside a worker
is in `worker.py`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Final

from expo.errors import GraderError
from expo.rewards import messages

WORKER: Final = "expo.rewards.worker"  # named, not imported: a process of its own runs it
Pair = tuple[str, str]  # answer and gold answer, both normalised

# An answer graded for longer than this is likely to hang: the longest of the golden table takes 0.1 s.
_SLOW_S: Final = 0.15
# Most processes at a time, as a multiple of the number of workers: three slow answers beside each brisk one.
_MAX_WIDTH: Final = 4
# Starting the template imports computer algebra: 2 s on an idle core, more on a loaded machine or a cold disk.
_START_TIMEOUT_S: Final = 120.0


@dataclass
class _Worker:
    """Our side of one grading process."""

    pid: int
    connection: Connection
    pair: Pair | None = None  # what it is grading
    started: float = 0.0  # s, monotonic clock

    def send(self, pair: Pair, *, check_gold_only: bool) -> None:
        """Starts on a pair; if the worker turns out to be dead, that shows when its outcome is awaited."""
        self.pair, self.started = pair, time.monotonic()
        answer, gold = pair
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps([None if check_gold_only else answer, gold]).encode())

    def receive(self) -> bytes | None:
        """What the worker says; None if it has died."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None


class _Template:
    """The process that workers are forked from, and our side of the socket that steers it."""

    def __init__(self, memory_bytes: int, alarm_s: int) -> None:
        self._control, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs, _signals_held_back():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(memory_bytes), str(alarm_s)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
            )
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            is_ready = self._control.recv(64) == messages.READY
        except OSError:
            is_ready = False
        if not is_ready:
            self.close()
            raise GraderError(
                f"the grading process did not start (status {self.process.returncode}); its error is on standard "
                "error, and `pip install 'expo-rl[train]'` installs what it needs"
            )

    def fork_worker(self) -> _Worker:
        ours, theirs = Pipe()
        with theirs:
            return _Worker(int(self._ask(b"fork", [theirs.fileno()])), ours)

    def end_worker(self, worker: _Worker) -> None:
        """Kills the worker, whatever it is doing, and waits until it is gone."""
        worker.connection.close()
        reply = self._ask(str(worker.pid).encode(), [])
        assert reply == messages.DONE

    def close(self) -> None:
        """Ends the template, which ends its workers first."""
        self._control.close()
        try:
            self.process.wait(_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def disown(self) -> None:
        """Lets go of another process's template without ending it."""
        self._control.close()
        self.process.returncode = 0  # tells Popen that there is nothing to wait for

    def _ask(self, message: bytes, fds: list[int]) -> bytes:
        try:
            socket.send_fds(self._control, [message], fds)
            reply = self._control.recv(64)
        except OSError:
            reply = b""
        if not reply:
            raise GraderError("the grading process was ended from outside; grading again starts a new one")
        return reply


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started inside never gets the signals that ask a run to stop: sent to the whole process group, they
    would end the grading that the trainer still has to finish. It ends with the trainer, by its socket.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """The worker processes of one verifier. Not thread-safe: its verifier holds a lock."""

    def __init__(self, num_workers: int, timeout_s: float, memory_bytes: int) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._owner = os.getpid()
        self._template: _Template | None = None
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """Ends all processes; `run` starts new ones."""
        template, workers = self._template, self._workers
        self._template, self._workers = None, []
        for worker in workers:
            worker.connection.close()
        if template is not None:
            # in a process forked from the owner these are copies: the workers are not its own
            template.close() if os.getpid() == self._owner else template.disown()

    def run(self, pairs: Iterable[Pair], *, check_gold_only: bool = False) -> dict[Pair, bytes | None]:
        """What the workers say about each pair, None where a worker died or was killed over it."""
        queue = deque(pairs)
        outcomes: dict[Pair, bytes | None] = {}
        if not queue:
            return outcomes
        if os.getpid() != self._owner or (self._template is not None and self._template.process.poll() is not None):
            self.close()
        try:
            if self._template is None:
                self._owner = os.getpid()
                # a worker's own alarm, for when this process has died, comes after the deadline kept here
                self._template = _Template(self._memory_bytes, int(self._timeout_s) + 2)
            for worker in list(self._workers):
                if worker.connection.poll():  # the end of the file: it was killed while idle
                    self._end(worker)
            while queue or any(worker.pair for worker in self._workers):
                self._hand_out(queue, check_gold_only)
                self._collect(outcomes, is_queue_empty=not queue)
            for worker in self._workers[self._num_workers :]:
                self._end(worker)
            while len(self._workers) < self._num_workers:
                self._workers.append(self._template.fork_worker())
        except BaseException:
            # an outcome still on its way would be taken for that of a later pair
            self.close()
            raise
        return outcomes

    def _end(self, worker: _Worker) -> None:
        assert self._template is not None
        self._workers.remove(worker)
        self._template.end_worker(worker)

    def _hand_out(self, queue: deque[Pair], check_gold_only: bool) -> None:
        """Gives out pairs until `num_workers` are at work, not counting those that take suspiciously long."""
        assert self._template is not None
        now = time.monotonic()
        num_brisk = sum(worker.pair is not None and now - worker.started < _SLOW_S for worker in self._workers)
        idle = [worker for worker in self._workers if worker.pair is None]
        while queue and num_brisk < self._num_workers:
            if idle:
                worker = idle.pop()
            elif len(self._workers) < _MAX_WIDTH * self._num_workers:
                worker = self._template.fork_worker()
                self._workers.append(worker)
            else:
                return
            worker.send(queue.popleft(), check_gold_only=check_gold_only)
            num_brisk += 1

    def _collect(self, outcomes: dict[Pair, bytes | None], *, is_queue_empty: bool) -> None:
        """Waits until a worker speaks, becomes slow or is overdue, and settles what that concerns."""
        at_work = {worker.connection: worker for worker in self._workers if worker.pair is not None}
        now = time.monotonic()
        limits = [worker.started + self._timeout_s for worker in at_work.values()]
        if not is_queue_empty:
            limits += [worker.started + _SLOW_S for worker in at_work.values() if now - worker.started < _SLOW_S]
        spoken = wait(list(at_work), max(0.0, min(limits) - now))
        now = time.monotonic()
        for connection, worker in at_work.items():
            assert worker.pair is not None
            message = worker.receive() if connection in spoken else None
            if connection not in spoken and now - worker.started < self._timeout_s:
                continue
            outcomes[worker.pair] = message
            worker.pair = None
            if message is None:
                self._end(worker)
