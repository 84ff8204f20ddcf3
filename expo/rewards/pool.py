"""A pool of worker processes that grade one pair of answers at a time and are killed at a timeout.

An answer such as `9^{9^{9}}` can occupy computer algebra for hours or fill the memory, and only killing the process
ends that. The trainer's process measures the wall-clock time; a worker that exceeds it is killed and replaced.
`worker.py` is the code that the workers run.
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
from expo.runtime.signals import SIGNALS

WORKER: Final = "expo.rewards.worker"  # not imported here: a separate process runs it
Pair = tuple[str, str]  # answer and gold answer, both normalised

# An answer that takes longer is likely to hang: the slowest of the golden table takes 0.1 s.
_SLOW_S: Final = 0.15
# Limit on processes, as a multiple of the number of workers: three slow answers for each fast one.
_MAX_PROCESSES_PER_WORKER: Final = 4
# Starting the template imports computer algebra: 2 s on an idle core, more on a busy machine or with a cold disk.
_START_TIMEOUT_S: Final = 120.0


@dataclass
class _Worker:
    """One worker process, as the trainer sees it."""

    pid: int
    connection: Connection
    pair: Pair | None = None  # being graded
    started: float = 0.0  # s, monotonic clock

    def send(self, pair: Pair, *, check_gold_only: bool) -> None:
        """Sends a pair to grade; a dead worker is noticed when its outcome is read."""
        self.pair, self.started = pair, time.monotonic()
        answer, gold = pair
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps([None if check_gold_only else answer, gold]).encode())

    def receive(self) -> bytes | None:
        """The worker's outcome; None if it has died."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None


class _Template:
    """The process that forks the workers, and the socket that controls it."""

    def __init__(self, memory_bytes: int, alarm_s: int, method: str) -> None:
        self._control, remote = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        # a user's verifier may lie in the folder where the run starts
        folders = [str(Path.cwd())] if ":" in method else []
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")]), *folders]
        with remote, _blocked_stop_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER, str(remote.fileno()), str(memory_bytes), str(alarm_s), method],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
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
                f"the grading process did not start (status {self.process.returncode}); its error is on stderr, and "
                "`pip install 'expo-rl[train]'` installs its requirements"
            )

    def fork_worker(self) -> _Worker:
        local, remote = Pipe()
        with remote:
            return _Worker(int(self._request(b"fork", [remote.fileno()])), local)

    def end_worker(self, worker: _Worker) -> None:
        """Kills the worker and waits until it has ended."""
        worker.connection.close()
        reply = self._request(str(worker.pid).encode(), [])
        assert reply == messages.DONE

    def close(self) -> None:
        """Ends the template, which first ends its workers."""
        self._control.close()
        try:
            self.process.wait(_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def disown(self) -> None:
        """Closes the socket of another process's template without ending it."""
        self._control.close()
        self.process.returncode = 0  # tells Popen that there is nothing to wait for

    def _request(self, message: bytes, fds: list[int]) -> bytes:
        try:
            socket.send_fds(self._control, [message], fds)
            reply = self._control.recv(64)
        except OSError:
            reply = b""
        if not reply:
            raise GraderError("the grading process was ended from outside; grading again starts a new one")
        return reply


@contextlib.contextmanager
def _blocked_stop_signals() -> Iterator[None]:
    """Blocks, for a process started inside, the signals that ask a run to stop: sent to the whole process group, they
    would end the grading that the trainer still has to finish. The process ends when the trainer's socket closes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """The worker processes of one verifier. Not thread-safe: its verifier holds a lock."""

    def __init__(self, num_workers: int, timeout_s: float, memory_bytes: int, method: str = "math") -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._method = method
        self._owner = os.getpid()
        self._template: _Template | None = None
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """Ends all processes; the next `run` starts new ones."""
        template, workers = self._template, self._workers
        self._template, self._workers = None, []
        for worker in workers:
            worker.connection.close()
        if template is not None:
            # in a process forked from the owner these are copies: it must not end the owner's workers
            template.close() if os.getpid() == self._owner else template.disown()

    def run(self, pairs: Iterable[Pair], *, check_gold_only: bool = False) -> dict[Pair, bytes | None]:
        """The workers' outcome for each pair; None if a worker died or was killed while grading it."""
        queue = deque(pairs)
        outcomes: dict[Pair, bytes | None] = {}
        if not queue:
            return outcomes
        if os.getpid() != self._owner or (self._template is not None and self._template.process.poll() is not None):
            self.close()
        try:
            if self._template is None:
                self._owner = os.getpid()
                # a worker's own alarm is later than the timeout here: it is for the case that this process has died
                self._template = _Template(self._memory_bytes, int(self._timeout_s) + 2, self._method)
            for worker in list(self._workers):
                if worker.connection.poll():  # end of file: it was killed while idle
                    self._end(worker)
            while queue or any(worker.pair for worker in self._workers):
                self._send_pairs(queue, check_gold_only)
                self._collect(outcomes, is_queue_empty=not queue)
            for worker in self._workers[self._num_workers :]:
                self._end(worker)
            while len(self._workers) < self._num_workers:
                self._workers.append(self._template.fork_worker())
        except BaseException:
            # an outcome that arrives later would be taken for that of another pair
            self.close()
            raise
        return outcomes

    def _end(self, worker: _Worker) -> None:
        assert self._template is not None
        self._workers.remove(worker)
        self._template.end_worker(worker)

    def _send_pairs(self, queue: deque[Pair], check_gold_only: bool) -> None:
        """Sends pairs until `num_workers` workers are busy, not counting slow ones."""
        assert self._template is not None
        now = time.monotonic()
        num_fast = sum(worker.pair is not None and now - worker.started < _SLOW_S for worker in self._workers)
        idle = [worker for worker in self._workers if worker.pair is None]
        while queue and num_fast < self._num_workers:
            if idle:
                worker = idle.pop()
            elif len(self._workers) < _MAX_PROCESSES_PER_WORKER * self._num_workers:
                worker = self._template.fork_worker()
                self._workers.append(worker)
            else:
                return
            worker.send(queue.popleft(), check_gold_only=check_gold_only)
            num_fast += 1

    def _collect(self, outcomes: dict[Pair, bytes | None], *, is_queue_empty: bool) -> None:
        """Waits until a worker answers, becomes slow or exceeds the timeout; records outcomes and ends dead workers."""
        busy = {worker.connection: worker for worker in self._workers if worker.pair is not None}
        now = time.monotonic()
        limits = [worker.started + self._timeout_s for worker in busy.values()]
        if not is_queue_empty:
            limits += [worker.started + _SLOW_S for worker in busy.values() if now - worker.started < _SLOW_S]
        answered = wait(list(busy), max(0.0, min(limits) - now))
        now = time.monotonic()
        for connection, worker in busy.items():
            assert worker.pair is not None
            message = worker.receive() if connection in answered else None
            if connection not in answered and now - worker.started < self._timeout_s:
                continue
            outcomes[worker.pair] = message
            worker.pair = None
            if message is None:
                self._end(worker)
