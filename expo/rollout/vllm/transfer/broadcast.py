"""Weight transfer by broadcast: rank 0 sends the weights to each server's workers directly.

A weight sync streams every bucket to all servers as it is gathered, and keeps a copy in the host's memory. A server
that restarts is sent that copy over TCP, by the thread of its supervisor, while the policy may already be training.
Weights that are staged for later are only copied, and sent over TCP when they are used. So are LoRA adapters, which are
small, and the base weights under them, which a server is sent once.
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
from expo.rollout.vllm.transfer.buckets import Bucket, fill_buckets
from expo.rollout.vllm.transfer.connection import GroupError, Listener
from expo.rollout.vllm.transfer.group import END_OF_UPDATE, Sender, address_toward, gather_workers
from expo.rollout.vllm.transfer.interface import activate

SHUTDOWN_S = 2.0


class WeightBroadcast:
    """Sends the policy's weights from rank 0, and keeps a copy that a restarted server can be sent.

    Args:
        servers: all servers.
        workers: number of workers of each server.
        device: of the policy on rank 0.
        patience_s: deadline of every wait, in seconds.
    """

    def __init__(self, servers: Sequence[Server], workers: int, device: torch.device, patience_s: float) -> None:
        self._device = device
        self._channels = {server.url: _Channel(server, 1 + workers, patience_s) for server in servers}
        self._copy: tuple[str, list[Bucket]] | None = None
        self._staged: dict[str, list[Bucket]] = {}
        self._base: tuple[str, list[Bucket]] | None = None

    @property
    def version(self) -> str | None:
        """The name of the copy; None while it is incomplete."""
        copy = self._copy
        return None if copy is None else copy[0]

    def keep_base(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the weights to which adapters are applied; all others are LoRA adapters then."""
        self._base = uuid.uuid4().hex, self._copies(weights)

    def publish(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends new weights to every server, and keeps them in place of the old copy; adapters are left to `send`.

        A server that does not receive them is reported on stderr; its supervisor sends them again.
        """
        self._copy = None  # before the new copy is made, so that its memory is free
        if self._base is not None:
            self.use(self.stage(weights))
            return
        version, buckets = uuid.uuid4().hex, list[Bucket]()

        def copied() -> Iterable[Bucket]:
            for bucket in fill_buckets(weights, self._device, interface.BUCKET_BYTES):
                buckets.append(bucket.copy_to_cpu())
                yield bucket

        # a channel on which a supervisor is sending the old weights is left to that supervisor
        channels = [channel for channel in self._channels.values() if channel.lock.acquire(blocking=False)]
        try:
            _broadcast(channels, copied(), "nccl" if self._device.type == "cuda" else "tcp", version)
        finally:
            for channel in channels:
                channel.lock.release()
        for channel in channels:
            if channel.problem is not None:
                reason = f"{channel.problem}; they are sent again"
                print(f"the vLLM server {channel.server.url} did not receive the weights: {reason}", file=sys.stderr)
        self._copy = version, buckets

    def stage(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Copies weights for a later `use`, and returns their name."""
        base = "" if self._base is None else self._base[0]
        version = f"{base}{uuid.uuid4().hex}"
        self._staged[version] = self._copies(weights)
        return version

    def _copies(self, weights: Iterable[tuple[str, Tensor]]) -> list[Bucket]:
        buckets = fill_buckets(weights, self._device, interface.BUCKET_BYTES)
        return [bucket.copy_to_cpu() for bucket in buckets]

    def use(self, version: str) -> None:
        """Makes staged weights the current ones, which `send` sends, and drops those staged before them."""
        for earlier in list(self._staged):
            buckets = self._staged.pop(earlier)
            if earlier == version:
                break
        self._copy = version, buckets

    def send(self, server: Server, version: str) -> None:
        """Sends the copy to a server through a new group. Raises: ServerUnavailable, EngineError."""
        channel = self._channels[server.url]
        with channel.lock:
            copy = self._copy
            if copy is None or copy[0] != version:
                raise ServerUnavailable("a newer weight sync has begun")
            base, buckets = self._base, copy[1]
            if base is None:
                _send(channel, version, buckets)
                return
            interface.send_adapter(
                server,
                base[0],
                version,
                send_base=lambda: _send(channel, *base),
                send_matrices=lambda: _send_adapter(channel, version, buckets),
            )

    def close(self) -> None:
        """Leaves the groups of all servers."""
        for channel in self._channels.values():
            with suppress(ServerUnavailable, EngineError):
                Call(channel.server, "/shutdown_weight_transfer_engine").result(SHUTDOWN_S)
            channel.close()


class _Channel:
    """The connection between rank 0 and the workers of one server.

    Attributes:
        lock: held by the thread that sends.
        problem: why the last update failed; None: it did not.
    """

    def __init__(self, server: Server, size: int, patience_s: float) -> None:
        self.server, self._size, self._patience_s = server, size, patience_s
        self.lock = threading.Lock()
        self.problem: ServerUnavailable | EngineError | None = None
        self._group: Sender | None = None
        self._update: Call | None = None

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Runs a step of an update, unless an earlier one has failed."""
        if self.problem is not None:
            return
        try:
            step(*arguments)
        except (ServerUnavailable, EngineError) as error:
            self.problem = error
        except (GroupError, OSError) as error:
            self.problem = ServerUnavailable(f"{error}")
        if self.problem is not None:
            self.close()

    def begin_update(self, backend: str, version: str, is_adapter: bool) -> None:
        """Has the server wait for weights."""
        if self._group is None:
            self._group = self._join(backend)
        try:
            self.server.post("/start_weight_update")
        except ServerUnavailable:  # another run may have died in the middle of an update
            self.server.post("/finish_weight_update")
            self.server.post("/start_weight_update")
        info = {"version": version, "is_adapter": is_adapter}
        self._update = Call(self.server, "/update_weights", {"update_info": info})
        self._group.start(version)
        self._group.wait(self._update.check)

    def _join(self, backend: str) -> Sender:
        address = address_toward(*self.server.address)
        listener = Listener(address, self.server.key, self._patience_s)
        rendezvous = {"host": address, "port": listener.port, "size": self._size}
        info = {**rendezvous, "backend": backend, "timeout_s": self._patience_s}
        call = Call(self.server, "/init_weight_transfer_engine", {"init_info": info})
        try:
            group = gather_workers(listener, self._size, backend, self._patience_s, call.check)
            call.result(self._patience_s)
        finally:
            call.cancel()
            listener.close()
        return group

    def start_bucket(self, bucket: Bucket) -> None:
        """Begins to send a bucket."""
        assert self._group is not None
        self._group.start(bucket.manifest(), bucket.data)

    def wait_for_bucket(self) -> None:
        """Waits until the bucket has been sent, or the server has failed."""
        assert self._group is not None
        assert self._update is not None
        self._group.wait(self._update.check)

    def finish_update(self, version: str, is_adapter: bool) -> None:
        """Waits until the server uses the weights, or has the adapter."""
        assert self._group is not None
        assert self._update is not None
        self._group.start(END_OF_UPDATE)
        self._group.wait(self._update.check)
        self._update.result(self._patience_s)
        self._update = None
        self.server.post("/finish_weight_update")
        if not is_adapter:
            activate(self.server, version)

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not ended."""
        return self._update is not None

    def close(self) -> None:
        """Abandons an update under way and leaves the group."""
        if self._update is not None:
            self._update.cancel()
        if self._group is not None:
            self._group.close()
        self._update = self._group = None


def _send(channel: _Channel, version: str, buckets: Iterable[Bucket], *, is_adapter: bool = False) -> None:
    """Sends to one server through a new group. Raises: ServerUnavailable, EngineError."""
    channel.close()  # the group of the server's previous process
    _broadcast([channel], buckets, "tcp", version, is_adapter)
    channel.close()  # the next weight sync uses NCCL where there are GPUs
    if channel.problem is not None:
        raise channel.problem


def _send_adapter(channel: _Channel, version: str, buckets: Iterable[Bucket]) -> Any:
    """The same with an adapter, which the server then loads; returns its answer."""
    _send(channel, version, buckets, is_adapter=True)
    return channel.server.post("/collective_rpc", {"method": "use_received_adapter"})


def _broadcast(
    channels: Sequence[_Channel], buckets: Iterable[Bucket], backend: str, version: str, is_adapter: bool = False
) -> None:
    """Sends each bucket through every channel; all buckets are consumed even if every channel fails."""
    for channel in channels:
        channel.problem = None
        channel.attempt(channel.begin_update, backend, version, is_adapter)
    try:
        for bucket in buckets:
            for channel in channels:
                channel.attempt(channel.start_bucket, bucket)
            for channel in channels:
                channel.attempt(channel.wait_for_bucket)
        for channel in channels:
            channel.attempt(channel.finish_update, version, is_adapter)
    finally:
        for channel in channels:
            if channel.is_updating:
                channel.close()
