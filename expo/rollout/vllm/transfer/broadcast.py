"""Weights on their way to servers straight from rank 0, which broadcasts them to each server's workers.

A sync streams every bucket to all servers as it is gathered, and keeps a copy in the host's memory. A server that dies
is given that copy, over gloo and by the thread that keeps it: the policy may be learning meanwhile.
"""

import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from expo.errors import EngineError
from expo.rollout.vllm.client import Call, Server, ServerUnavailable
from expo.rollout.vllm.transfer import interface
from expo.rollout.vllm.transfer.group import (
    END,
    ROOT,
    Bucket,
    Group,
    GroupError,
    address_toward,
    new_store,
    pack,
    wait_for_workers,
)
from expo.rollout.vllm.transfer.interface import settle

SHUTDOWN_S = 2.0


class WeightBroadcast:
    """The policy's weights as rank 0 sends them, and a copy that a server can be given again.

    Args:
        servers: all of them.
        workers: of each.
        device: of the policy on rank 0.
        patience_s: deadline of every wait.
    """

    def __init__(self, servers: Sequence[Server], workers: int, device: torch.device, patience_s: float) -> None:
        self._device = device
        self._lines = {server.url: _Line(server, 1 + workers, patience_s) for server in servers}
        self._kept: tuple[str, list[Bucket]] | None = None

    @property
    def version(self) -> str | None:
        """What the copy is called; None: it is being made."""
        kept = self._kept
        return None if kept is None else kept[0]

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends new weights to every server that takes them, and keeps them in place of the old.

        A server that does not take them is told of on stderr, to be brought them afterwards.
        """
        self._kept = None  # before the new copy is made, so that there is room for it
        version, copy = uuid.uuid4().hex, list[Bucket]()

        def copied() -> Iterable[Bucket]:
            for bucket in pack(weights, self._device, interface.BUCKET_BYTES):
                copy.append(bucket.kept())
                yield bucket

        # one that its supervisor is bringing the old ones to is left to that thread
        lines = [line for line in self._lines.values() if line.lock.acquire(blocking=False)]
        try:
            _deliver(lines, copied(), "nccl" if self._device.type == "cuda" else "gloo", version)
        finally:
            for line in lines:
                line.lock.release()
        for line in lines:
            if line.problem is not None:
                reason = f"{line.problem}; it is given them again"
                print(f"the vLLM server {line.server.url} did not take the weights: {reason}", file=sys.stderr)
        self._kept = version, copy

    def bring(self, server: Server, version: str) -> None:
        """Gives the server the copy, through a new group. Raises: ServerUnavailable, EngineError."""
        line = self._lines[server.url]
        with line.lock:
            kept = self._kept
            if kept is None or kept[0] != version:
                raise ServerUnavailable("newer weights are on their way to it")
            line.close()  # what it was part of, if it was
            _deliver([line], kept[1], "gloo", version)
            line.close()  # the next sync is not over gloo, if there are GPUs
            if line.problem is not None:
                raise line.problem

    def close(self) -> None:
        """Leaves the servers."""
        for line in self._lines.values():
            with suppress(ServerUnavailable, EngineError):
                Call(line.server, "/shutdown_weight_transfer_engine").result(SHUTDOWN_S)
            line.close()


class _Line:
    """The way to one server's workers.

    Attributes:
        lock: held by whoever sends.
        problem: why what was sent last did not arrive.
    """

    def __init__(self, server: Server, size: int, patience_s: float) -> None:
        self.server, self._size, self._patience_s = server, size, patience_s
        self.lock = threading.Lock()
        self.problem: ServerUnavailable | EngineError | None = None
        self._group: Group | None = None
        self._call: Call | None = None
        self._prefix, self._notes = "", list[str]()

    def attempt(self, step: Callable[..., None], *given: Any) -> None:
        """Takes a step, unless an earlier one has failed."""
        if self.problem is not None:
            return
        try:
            step(*given)
        except (ServerUnavailable, EngineError) as error:
            self.problem = error
        except (GroupError, OSError) as error:
            self.problem = ServerUnavailable(f"{error}")
        if self.problem is not None:
            self.close()

    def begin(self, backend: str, version: str) -> None:
        """Has the server wait for weights."""
        if self._group is None:
            self._group = self._join(backend)
        self._prefix, self._notes = version, []
        try:
            self.server.post("/start_weight_update")
        except ServerUnavailable:  # it may be that another run died in the middle of an update
            self.server.post("/finish_weight_update")
            self.server.post("/start_weight_update")
        self._call = Call(self.server, "/update_weights", {"update_info": {"version": version}})

    def _join(self, backend: str) -> Group:
        address = address_toward(*self.server.place)
        store = new_store(address, self._size, self._patience_s)
        place = {"host": address, "port": store.port, "size": self._size}
        info = {**place, "backend": backend, "timeout_s": self._patience_s}
        call = Call(self.server, "/init_weight_transfer_engine", {"init_info": info})
        try:
            wait_for_workers(store, self._size, self._patience_s, call.check)
            group = Group(store, ROOT, self._size, backend, address, self._patience_s)
            call.result(self._patience_s)
        finally:
            call.hang_up()
        return group

    def start(self, bucket: Bucket) -> None:
        """Begins to send a bucket."""
        self._note(bucket.manifest())
        assert self._group is not None
        self._group.start(bucket.data)

    def wait(self) -> None:
        """Returns when the bucket has been sent, or the server has failed."""
        assert self._group is not None
        assert self._call is not None
        self._group.wait(self._call.check)

    def end(self, version: str) -> None:
        """Returns when the server uses the weights."""
        self._note(END)
        assert self._group is not None
        assert self._call is not None
        self._call.result(self._patience_s)
        self._call = None
        self._group.forget(self._notes)
        self.server.post("/finish_weight_update")
        settle(self.server, version)

    def _note(self, text: str) -> None:
        assert self._group is not None
        self._notes.append(f"{self._prefix}/{len(self._notes)}")
        self._group.announce(self._notes[-1], text)

    @property
    def is_sending(self) -> bool:
        """Whether an update has begun and not ended."""
        return self._call is not None

    def close(self) -> None:
        """Gives up what is under way."""
        if self._call is not None:
            self._call.hang_up()
        if self._group is not None:
            self._group.close()
        self._call = self._group = None


def _deliver(lines: Sequence[_Line], buckets: Iterable[Bucket], backend: str, version: str) -> None:
    """Sends each bucket through every line; the buckets are gone through whatever happens to a line."""
    for line in lines:
        line.problem = None
        line.attempt(line.begin, backend, version)
    try:
        for bucket in buckets:
            for line in lines:
                line.attempt(line.start, bucket)
            for line in lines:
                line.attempt(line.wait)
        for line in lines:
            line.attempt(line.end, version)
    finally:
        for line in lines:
            if line.is_sending:
                line.close()
