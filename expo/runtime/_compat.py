"""Every private API of torch that the trainer uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ASYNC_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read when an NCCL group is created


def new_nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group of NCCL beside the default one, among processes that share nothing but a store.

    Args:
        store: that all its processes use.
        rank: of this process in the group.
        size: number of its processes.
        timeout: of every collective.

    Raises: RuntimeError if it cannot be made.
    """
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
