"""Rank 0 and the workers of one server, to which it broadcasts weights.

Both sides run this file. All messages go over connections on which both sides have proved that they know the server's
key, and so do the buckets between CPUs; between GPUs the buckets go over NCCL, whose group is made through those
connections. Every wait has a deadline.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from expo.rollout.vllm.transfer.connection import HANDSHAKE_S, Connection, GroupError, Listener, connect
from expo.rollout.vllm.transfer.nccl import POLL_S, ROOT, NcclGroup
from expo.rollout.vllm.transfer.store import RemoteStore, new_store, serve_store

BACKEND = "expo"  # the name under which vLLM knows the receiving side; see `worker.py`
END_OF_UPDATE = json.dumps(None)  # sent in place of a further manifest


class Sender:
    """Rank 0's side of a group.

    Args:
        connections: to each worker, in order of rank.
        nccl: the process group for buckets on GPUs; None: buckets are on CPUs.
        timeout_s: deadline of every wait, in seconds.
    """

    def __init__(self, connections: Sequence[Connection], nccl: NcclGroup | None, timeout_s: float) -> None:
        self._connections, self._nccl, self._timeout_s = connections, nccl, timeout_s
        self._sending: list[Future[None]] = []

    def start(self, message: str, data: Tensor | None = None) -> None:
        """Begins to send a message to every worker, and after it a bucket's data. Raises: GroupError."""
        assert not self._sending, "one broadcast at a time"
        parts: list[Any] = [message.encode()]
        if data is not None and self._nccl is None:
            parts.append(data.numpy())
        self._sending = [_start_sending(connection, parts) for connection in self._connections]
        if data is not None and self._nccl is not None:
            self._nccl.start(data)

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits until all workers have it; `check` may raise to end the wait. Raises: GroupError."""
        deadline = time.monotonic() + self._timeout_s
        while not self._is_sent():
            if time.monotonic() > deadline:
                raise GroupError(f"a broadcast took more than {self._timeout_s:g} s")
            check()
            time.sleep(POLL_S)
        self._sending = []
        if self._nccl is not None:
            self._nccl.finish()

    def _is_sent(self) -> bool:
        done = [sending for sending in self._sending if sending.done()]
        for sending in done:
            sending.result()  # raises what it failed with
        return len(done) == len(self._sending) and (self._nccl is None or self._nccl.is_done)

    def close(self) -> None:
        """Leaves the group and abandons a broadcast under way; the workers notice at their next wait."""
        _close(self._connections, self._nccl)


class Receiver:
    """A worker's side of a group.

    Args:
        connections: the one for weights, and others to close with it.
        nccl: as for `Sender`.
    """

    def __init__(self, connections: Sequence[Connection], nccl: NcclGroup | None) -> None:
        self._connections, self._nccl = connections, nccl

    def read_message(self) -> str:
        """The next message. Raises: GroupError."""
        return self._connections[0].receive().decode()

    def receive(self, data: Tensor) -> None:
        """Fills a tensor of bytes with a bucket's data. Raises: GroupError."""
        if self._nccl is None:
            self._connections[0].receive_into(data.numpy())
            return
        self._nccl.start(data)
        self._nccl.wait()

    def close(self) -> None:
        """Leaves the group; rank 0 and the other workers notice at their next wait."""
        _close(self._connections, self._nccl)


def _start_sending(connection: Connection, parts: Sequence[Any]) -> "Future[None]":
    """Sends in a thread: a worker that does not read must not block the others."""
    future: Future[None] = Future()

    def send() -> None:
        try:
            for part in parts:
                connection.send(part)
        except GroupError as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=send, name="broadcast of weights", daemon=True).start()
    return future


def _close(connections: Sequence[Connection], nccl: NcclGroup | None) -> None:
    for connection in connections:
        connection.close()
    if nccl is not None:
        nccl.close()


# --- joining


def address_toward(host: str, port: int) -> str:
    """This machine's address as `host` sees it; nothing is sent. Raises: OSError if there is no route."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def gather_workers(
    listener: Listener, size: int, backend: str, timeout_s: float, check: Callable[[], None] = lambda: None
) -> Sender:
    """Rank 0's side of a new group, once all workers have come; `check` may raise to end the wait.

    Args:
        listener: to which they connect.
        size: number of processes in the group.
        backend: "nccl" or "tcp".
        timeout_s: deadline of every wait, in seconds.
        check: called while it waits.

    Raises: GroupError if they do not come.
    """
    deadline = time.monotonic() + timeout_s
    connections = []
    store = new_store()
    for rank in range(ROOT + 1, size):
        connections.append(_wait_for(listener, f"weights/{rank}", deadline, timeout_s, check))
        if backend == "nccl":
            serve_store(store, _wait_for(listener, f"store/{rank}", deadline, timeout_s, check))
    nccl = NcclGroup(store, ROOT, size, timeout_s) if backend == "nccl" else None
    return Sender(connections, nccl, timeout_s)


def _wait_for(
    listener: Listener, name: str, deadline: float, timeout_s: float, check: Callable[[], None]
) -> Connection:
    while (connection := listener.take(name)) is None:
        if time.monotonic() > deadline:
            raise GroupError(
                f"its workers have not reached {listener.address}:{listener.port} within {timeout_s:g} s; see that "
                f"they can reach this machine there, or take vllm.transfer = files"
            )
        check()
        time.sleep(POLL_S)
    return connection


def join(address: tuple[str, int], key: str, rank: int, size: int, backend: str, timeout_s: float) -> Receiver:
    """A worker's side of a group, whose listener is at `address` and knows the key. Raises: GroupError."""
    connections = [connect(address, key, f"weights/{rank}", timeout_s)]
    nccl = None
    if backend == "nccl":
        # rank 0 answers a wait that took too long; the connection itself waits longer for that answer
        connections.append(connect(address, key, f"store/{rank}", timeout_s + HANDSHAKE_S))
        nccl = NcclGroup(RemoteStore(connections[1], timeout_s), rank, size, timeout_s)
    return Receiver(connections, nccl)
