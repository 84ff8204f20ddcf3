"""Every private API of torch that the trainer uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ASYNC_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read when an NCCL group is created


def new_process_group(backend: str, store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    """A process group beside the default one, among processes that share nothing but a store.

    Args:
        backend: "nccl" or "gloo".
        store: a TCPStore that all its processes reach.
        rank: of this process in the group.
        size: number of its processes.
        address: this machine's address at which the others reach it over gloo.
        timeout: of every collective.

    Raises: RuntimeError if the other processes do not come.
    """
    return _nccl(store, rank, size, timeout) if backend == "nccl" else _gloo(store, rank, size, address, timeout)


def _gloo(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # by default gloo binds to what the host's name resolves to, which other machines may not reach
    options._devices, options._timeout = [gloo.create_device(hostname=address)], timeout
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # type: ignore[attr-defined,unused-ignore]
    options = nccl.Options()
    options._timeout = timeout
    # by default NCCL's watchdog ends this process when the other side dies; the caller watches the group itself
    with _environment(ASYNC_ERRORS, "0"):
        return nccl(store, rank, size, options)


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
