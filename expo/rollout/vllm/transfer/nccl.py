"""Broadcasts between GPUs by NCCL, among processes that share a store, with a deadline for each."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from expo.errors import first_line
from expo.rollout.vllm.transfer.connection import GroupError
from expo.runtime._compat import new_nccl_group

POLL_S = 0.001
ROOT = 0  # rank 0 of the run; the workers of the server have the ranks from 1


class NcclGroup:
    """A process group of NCCL, of which one broadcast is under way at a time.

    Args:
        store: that all processes of the group use.
        rank: of this process.
        size: number of processes.
        timeout_s: deadline of every broadcast, in seconds.

    Raises: GroupError if it cannot be made.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self._timeout_s, self._work, self._is_connected = timeout_s, None, False
        try:
            self._group: Any = new_nccl_group(store, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise GroupError(f"the NCCL group cannot be made: {first_line(error)}") from error

    def start(self, data: Tensor) -> None:
        """Begins to send, on rank 0, or to receive. Raises: GroupError."""
        try:
            self._work = self._group.broadcast(data, ROOT) if self._is_connected else self._first_broadcast(data)
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error

    def _first_broadcast(self, data: Tensor) -> Any:
        """Begins the first broadcast in a thread: it connects the processes inside the call, without a deadline."""
        stream = torch.cuda.current_stream(data.device) if data.is_cuda else None  # a new thread has its own
        begun: Future[Any] = Future()

        def begin() -> None:
            try:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    begun.set_result(self._group.broadcast(data, ROOT))
            except Exception as error:
                begun.set_exception(error)

        threading.Thread(target=begin, daemon=True).start()
        try:
            work = begun.result(self._timeout_s)
        except TimeoutError as error:
            raise GroupError(f"the other processes did not connect over NCCL in {self._timeout_s:g} s") from error
        self._is_connected = True
        return work

    @property
    def is_done(self) -> bool:
        """Whether no broadcast is under way, or the one that is has ended, also with an error."""
        return self._work is None or bool(self._work.is_completed())

    def finish(self) -> None:
        """Ends a broadcast that is done. Raises: GroupError if it failed."""
        work: Any = self._work
        self._work = None
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits for the broadcast; `check` may raise to end the wait. Raises: GroupError."""
        deadline = time.monotonic() + self._timeout_s
        while not self.is_done:
            if time.monotonic() > deadline:
                raise GroupError(f"a broadcast took more than {self._timeout_s:g} s")
            check()
            time.sleep(POLL_S)
        self.finish()

    def close(self) -> None:
        """Abandons a broadcast under way and leaves the group."""
        self._group.abort()
