"""How the ranks of a run meet: each announces itself in the launcher's store, and waits there for the others.

PyTorch's own rendezvous waits inside one call, which names neither the ranks that are missing nor those that have died.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.rendezvous import rendezvous

from expo.errors import RankError, first_line
from expo.runtime.signals import SIGNALS

POLL_S = 0.1
LOOK_S = 0.05  # for each rank, between looks for those that are missing
REPORT_AFTER_S = 30.0  # a rank that waits longer prints which ranks are missing
MOST_NAMED = 8  # ranks in a message


class Meeting:
    """What this rank knows of the others while it joins them.

    Attributes:
        missing: the ranks that have not announced themselves; None before this rank has reached the store.
        local_processes: process ids of the ranks on this machine, by rank, once all have announced themselves.
    """

    def __init__(self) -> None:
        self.missing: list[int] | None = None
        self.local_processes: dict[int, int] = {}

    def __str__(self) -> str:
        """What this rank waits for."""
        if self.missing is None:
            address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            return f"rank 0 or its launcher at {address}:{port}"
        return ranks_named(self.missing) if self.missing else "its connections to the other ranks"

    def attend(self, timeout_s: float) -> tuple[Any, int, int]:
        """Waits until every rank has announced itself. Returns: the store, this rank, and the number of ranks.

        Raises:
            ValueError: if the environment does not give this process a rank.
            RankError: if the other ranks do not come in time, or the store is gone.
        """
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
            key = f"expo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            store.set(f"{key}/{rank}", json.dumps([machine(), os.getpid()]))
            store.add(key, 1)
            self._wait_for_all(store, key, rank, size, timeout_s)
            announced = [json.loads(text) for text in store.multi_get([f"{key}/{other}" for other in range(size)])]
            self.local_processes = {
                other: process for other, (place, process) in enumerate(announced) if place == machine()
            }
        except RuntimeError as error:
            raise RankError(
                f"this rank waited for {self}, and the store where the ranks meet cannot be reached; rank 0 "
                f"or its launcher has ended ({first_line(error)})"
            ) from error
        return store, rank, size

    def _wait_for_all(self, store: Any, key: str, rank: int, size: int, timeout_s: float) -> None:
        started, looked, has_reported, missing = time.monotonic(), float("-inf"), False, list[int]()
        while True:
            num_announced, now = store.add(key, 0), time.monotonic()
            if num_announced >= size:
                self.missing = []
                return
            if now - looked > size * LOOK_S:  # a question to the store for each rank
                self.missing = missing = [other for other in range(size) if not store.check([f"{key}/{other}"])]
                looked = now
            if now - started > timeout_s:
                raise RankError(f"{self} did not start within {timeout_s:g} s")
            if now - started > REPORT_AFTER_S and not has_reported:
                if rank == min(set(range(size)) - set(missing), default=rank):  # one report is enough
                    sys.stderr.write(f"rank {rank} waits for {self} to start\n")
                has_reported = True
            time.sleep(POLL_S)


def ranks_named(numbers: list[int]) -> str:
    """Ranks as words: "rank 3", or "ranks 1, 2"."""
    named = ", ".join(map(str, numbers[:MOST_NAMED])) + (", ..." if len(numbers) > MOST_NAMED else "")
    return f"rank {named}" if len(numbers) == 1 else f"ranks {named}"


def machine() -> list[str]:
    """What identifies this machine and container: processes of equal ones can signal each other."""
    here = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these; two containers may have the same host name
        here += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return here


@contextmanager
def reported_signals(describe: Callable[[], str]) -> Iterator[None]:
    """While inside, a signal to stop ends this process after `describe()` is written to stderr, even if the main thread
    is inside a call that does not return; the exit code is 128 + the signal's number, as of a shell. Has no effect
    outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    # a handler in Python would wait for the main thread; the interpreter writes to this pipe at once
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_end_on_signal, args=(read, describe), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)


def _end_on_signal(read: int, describe: Callable[[], str]) -> None:
    while received := os.read(read, 1):
        if received[0] in SIGNALS:
            sys.stderr.write(f"{describe()}: ended by {signal.Signals(received[0]).name}\n")
            sys.stderr.flush()
            os._exit(128 + received[0])
    os.close(read)
