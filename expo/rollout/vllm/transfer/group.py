"""How weights travel between rank 0 and the workers of a server: packed into buckets, broadcast through a group.

Both sides run this file. Rank 0 keeps a store, where the workers find each other and what the next bucket holds; the
bytes go over NCCL between GPUs and over gloo between CPUs, by the same calls. Every wait has a deadline.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16  # bytes; a tensor may be viewed in a buffer of bytes where its elements would start, of any dtype
POLL_S = 0.001
BACKEND = "expo"  # by which vLLM knows the receiving side; see `worker.py`
END = json.dumps(None)  # announced in place of a further bucket
ROOT = 0  # rank 0 of the run; the workers of the server come after it
ASYNC_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read by NCCL's group when it is made


class GroupError(Exception):
    """The other side is gone, or has not come in time; this group is of no more use."""


@dataclass(frozen=True)
class Bucket:
    """Weights end to end in one buffer.

    Args:
        data: [num_bytes] uint8.
        names: of the weights, in order.
        dtypes: of each, as torch names it: "bfloat16".
        shapes: of each.
    """

    data: Tensor
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def manifest(self) -> str:
        """All but the data, as JSON."""
        return json.dumps([self.names, self.dtypes, self.shapes])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by name, as views of the data."""
        parts = _layout(self.dtypes, self.shapes)
        for name, dtype, shape, (start, end) in zip(self.names, self.dtypes, self.shapes, parts, strict=True):
            yield name, self.data[start:end].view(getattr(torch, dtype)).view(shape)

    def kept(self) -> "Bucket":
        """A copy in the host's memory."""
        return Bucket(self.data.to("cpu", copy=True), self.names, self.dtypes, self.shapes)


def empty_bucket(manifest: str, device: torch.device) -> Bucket:
    """A bucket for what `Bucket.manifest` describes, its data yet to come."""
    names, dtypes, shapes = json.loads(manifest)
    num_bytes = max((end for _, end in _layout(dtypes, shapes)), default=0)
    return Bucket(torch.empty(num_bytes, dtype=torch.uint8, device=device), names, dtypes, shapes)


def pack(weights: Iterable[tuple[str, Tensor]], device: torch.device, num_bytes: int) -> Iterator[Bucket]:
    """The weights, copied as they come; a bucket holds until the next is asked for, in whose place it is written.

    Args:
        weights: names and tensors; each is done with when the next is asked for.
        device: of the buckets.
        num_bytes: of a bucket; a weight that is larger makes its own, and those after it, as large as it is.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    names, dtypes, shapes, used = _nothing()
    for name, value in weights:
        start = _aligned(used)
        size = value.numel() * value.element_size()
        if names and start + size > len(buffer):
            yield Bucket(buffer[:used], names, dtypes, shapes)
            (names, dtypes, shapes, used), start = _nothing(), 0
        if size > len(buffer):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        used = start + size
        buffer[start:used].view(value.dtype).view(value.shape).copy_(value.detach())
        names.append(name)
        dtypes.append(str(value.dtype).removeprefix("torch."))
        shapes.append(list(value.shape))
    if names:
        yield Bucket(buffer[:used], names, dtypes, shapes)


def _nothing() -> tuple[list[str], list[str], list[list[int]], int]:
    return [], [], [], 0


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _layout(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The first byte of each weight, and that after its last."""
    parts, end = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        start = _aligned(end)
        end = start + torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        parts.append((start, end))
    return parts


def address_toward(host: str, port: int) -> str:
    """This machine's address as another sees it; nothing is sent. Raises: OSError if there is no way there."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


class Group:
    """Rank 0 and the workers of one server.

    Args:
        store: rank 0's, for this group alone.
        rank: ROOT, or a worker's number + 1.
        size: of the group.
        backend: "nccl" or "gloo".
        address: this machine's, at which the others reach it over gloo.
        timeout_s: of every wait, in seconds.

    Raises: GroupError if the others do not come.
    """

    def __init__(self, store: Any, rank: int, size: int, backend: str, address: str, timeout_s: float) -> None:
        self.store, self._timeout_s, self._work = store, timeout_s, None
        try:
            self._group: Any = _GROUPS[backend](store, rank, size, address, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise GroupError(f"the {backend} group cannot be made: {_first_line(error)}") from error

    def start(self, data: Tensor) -> None:
        """Begins to send, on rank 0, or to receive. Raises: GroupError."""
        assert self._work is None, "one broadcast at a time"
        try:
            self._work = self._group.broadcast(data, ROOT)
        except RuntimeError as error:
            raise GroupError(_first_line(error)) from error

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Returns when what was begun is done; `check` raises what ends the wait at once. Raises: GroupError too."""
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
            raise GroupError(_first_line(error)) from error

    def announce(self, key: str, text: str) -> None:
        """Leaves a note for the workers. Raises: GroupError."""
        try:
            self.store.set(key, text)
        except RuntimeError as error:
            raise GroupError(_first_line(error)) from error

    def read(self, key: str) -> str:
        """A note, when it comes. Raises: GroupError."""
        try:
            return str(self.store.get(key).decode())
        except RuntimeError as error:
            raise GroupError(f"nothing came from rank 0: {_first_line(error)}") from error

    def forget(self, keys: Iterable[str]) -> None:
        """Removes notes that all have read."""
        for key in keys:
            self.store.delete_key(key)

    def close(self) -> None:
        """Leaves the others, who find out when they wait for us; a broadcast under way is given up."""
        if self._group is not None:
            self._group.abort()
        if self._work is not None:
            # gloo cannot give one up: its group, which would wait for it, stays until its own deadline
            threading.Thread(target=_outlive, args=(self._work, self._group), daemon=True).start()
        self._work = self._group = self.store = None


def new_store(address: str, size: int, timeout_s: float) -> Any:
    """Rank 0's store, at a port of its own. Raises: GroupError."""
    try:
        return _store(address, 0, size, timeout_s, is_master=True)
    except RuntimeError as error:
        raise GroupError(f"cannot listen at {address}: {_first_line(error)}") from error


def _store(host: str, port: int, size: int, timeout_s: float, *, is_master: bool) -> Any:
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    deadline = timedelta(seconds=timeout_s)
    return store(host, port, size, is_master=is_master, timeout=deadline, wait_for_workers=False)


def join(host: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> Group:
    """A worker's side of a group whose store rank 0 keeps at `host`. Raises: GroupError."""
    try:
        store = _store(host, port, size, timeout_s, is_master=False)
        store.set(_joined(rank), "")
        address = address_toward(host, port)
    except (RuntimeError, OSError) as error:
        raise GroupError(f"no way to rank 0 at {host}:{port}: {_first_line(error)}") from error
    return Group(store, rank, size, backend, address, timeout_s)


def wait_for_workers(store: Any, size: int, timeout_s: float, check: Callable[[], None]) -> None:
    """Returns when all have found the store; `check` raises what ends the wait at once. Raises: GroupError too."""
    deadline = time.monotonic() + timeout_s
    while not store.check([_joined(rank) for rank in range(ROOT + 1, size)]):
        if time.monotonic() > deadline:
            raise GroupError(
                f"its workers have not come to {store.host}:{store.port} within {timeout_s:g} s; see that they can "
                f"reach this machine there, or take vllm.transfer = files"
            )
        check()
        time.sleep(POLL_S)


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _gloo(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # left to itself it takes what the host's name resolves to, which others may not reach
    options._devices, options._timeout = [gloo.create_device(hostname=address)], timeout
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, _address: str, timeout: timedelta) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # type: ignore[attr-defined,unused-ignore]
    options = nccl.Options()
    options._timeout = timeout
    # left to itself its watchdog would end this process when the other side dies; `Group.wait` is the one who watches
    with _environment(ASYNC_ERRORS, "0"):
        return nccl(store, rank, size, options)


_GROUPS: dict[str, Callable[[Any, int, int, str, timedelta], Any]] = {"gloo": _gloo, "nccl": _nccl}


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _outlive(work: Any, group: Any) -> None:
    while not work.is_completed():
        time.sleep(1)
    del group


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:300]
