"""A process group of rank 0 and the workers of one server, through which weights are broadcast.

Both sides run this file. Rank 0 serves a store, where the workers find each other and the manifest of each bucket; the
buckets go over NCCL between GPUs and over gloo between CPUs, by the same calls. Every wait has a deadline.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expo.errors import first_line
from expo.runtime._compat import new_process_group

POLL_S = 0.001
BACKEND = "expo"  # the name under which vLLM knows the receiving side; see `worker.py`
END_OF_UPDATE = json.dumps(None)  # sent in place of a further manifest
ROOT = 0  # rank 0 of the run; the workers of the server have the ranks from 1


class GroupError(Exception):
    """The other side is gone or did not come in time; this group cannot be used any more."""


class Group:
    """Rank 0 and the workers of one server.

    Args:
        store: the store that rank 0 serves for this group alone.
        rank: ROOT, or 1 + the worker's number.
        size: number of processes in the group.
        backend: "nccl" or "gloo".
        address: this machine's address at which the others reach it over gloo.
        timeout_s: deadline of every wait, in seconds.

    Raises: GroupError if the others do not come.
    """

    def __init__(self, store: Any, rank: int, size: int, backend: str, address: str, timeout_s: float) -> None:
        self.store, self._timeout_s, self._work = store, timeout_s, None
        self._is_connected = backend != "nccl"
        try:
            timeout = timedelta(seconds=timeout_s)
            self._group: Any = new_process_group(backend, store, rank, size, address, timeout)
        except RuntimeError as error:
            raise GroupError(f"the {backend} group cannot be made: {first_line(error)}") from error

    def start_broadcast(self, data: Tensor) -> None:
        """Begins to send, on rank 0, or to receive. Raises: GroupError."""
        assert self._work is None, "one broadcast at a time"
        try:
            self._work = self._group.broadcast(data, ROOT) if self._is_connected else self._first_broadcast(data)
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error

    def _first_broadcast(self, data: Tensor) -> Any:
        """Begins the first broadcast over NCCL, which connects the processes inside the call, without a deadline.

        Raises: GroupError if they do not connect in time; RuntimeError.
        """
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

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits for the broadcast; `check` may raise to end the wait. Raises: GroupError."""
        work: Any = self._work
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise GroupError(f"a broadcast took more than {self._timeout_s:g} s")
            check()
            time.sleep(POLL_S)
        self._work = None
        try:
            work.wait()
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error

    def post_message(self, key: str, text: str) -> None:
        """Puts a message for the workers into the store. Raises: GroupError."""
        try:
            self.store.set(key, text)
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error

    def read_message(self, key: str) -> str:
        """A message from the store; waits until it is there. Raises: GroupError."""
        try:
            return str(self.store.get(key).decode())
        except RuntimeError as error:
            raise GroupError(f"nothing came from rank 0: {first_line(error)}") from error

    def delete_messages(self, keys: Iterable[str]) -> None:
        """Deletes messages that all workers have read."""
        for key in keys:
            self.store.delete_key(key)

    def close(self) -> None:
        """Leaves the group and abandons a broadcast under way; the other side notices at its next wait."""
        if self._group is not None:
            self._group.abort()
        if self._work is not None:
            # gloo cannot abort a broadcast, and its destructor would wait for it: keep the group until it times out
            threading.Thread(target=_keep_until_done, args=(self._work, self._group), daemon=True).start()
        self._work = self._group = self.store = None


def address_toward(host: str, port: int) -> str:
    """This machine's address as `host` sees it; nothing is sent. Raises: OSError if there is no route."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def new_store(address: str, size: int, timeout_s: float) -> Any:
    """Rank 0's store, at a port of its own. Raises: GroupError."""
    try:
        return _store(address, 0, size, timeout_s, is_master=True)
    except RuntimeError as error:
        raise GroupError(f"cannot listen at {address}: {first_line(error)}") from error


def _store(host: str, port: int, size: int, timeout_s: float, *, is_master: bool) -> Any:
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    deadline = timedelta(seconds=timeout_s)
    return store(host, port, size, is_master=is_master, timeout=deadline, wait_for_workers=False)


def join(host: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> Group:
    """A worker's side of a group whose store rank 0 serves at `host`. Raises: GroupError."""
    try:
        store = _store(host, port, size, timeout_s, is_master=False)
        store.set(_joined(rank), "")
        address = address_toward(host, port)
    except (RuntimeError, OSError) as error:
        raise GroupError(f"cannot reach rank 0 at {host}:{port}: {first_line(error)}") from error
    return Group(store, rank, size, backend, address, timeout_s)


def wait_for_workers(store: Any, size: int, timeout_s: float, check: Callable[[], None]) -> None:
    """Waits until all workers have reached the store; `check` may raise to end the wait. Raises: GroupError."""
    deadline = time.monotonic() + timeout_s
    while not store.check([_joined(rank) for rank in range(ROOT + 1, size)]):
        if time.monotonic() > deadline:
            raise GroupError(
                f"its workers have not reached {store.host}:{store.port} within {timeout_s:g} s; see that they can "
                f"reach this machine there, or take vllm.transfer = files"
            )
        check()
        time.sleep(POLL_S)


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _keep_until_done(work: Any, group: Any) -> None:
    while not work.is_completed():
        time.sleep(1)
    del group
