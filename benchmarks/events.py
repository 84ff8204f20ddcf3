"""Counts compilations and waits for the device inside a block.

A wait is any call that blocks the host until the device has finished earlier work: those that PyTorch's sync debug mode
reports, and `Event.synchronize`, `Stream.synchronize` and `torch.cuda.synchronize`, which it does not report.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

WAITING_CALLS = (
    ("torch.cuda.Event.synchronize", torch.cuda.Event, "synchronize"),
    ("torch.cuda.Stream.synchronize", torch.cuda.Stream, "synchronize"),
    ("torch.cuda.synchronize", torch.cuda, "synchronize"),
)


@dataclass
class Counts:
    """Events since the start of the block; `wait_names` has an entry for each wait."""

    graphs: int = 0
    binaries: int = 0
    wait_names: list[str] = field(default_factory=list)

    @property
    def waits(self) -> int:
        """Calls that waited for the device."""
        return len(self.wait_names)


@contextmanager
def counted(device: torch.device) -> Iterator[Counts]:
    """Counts events inside the block."""
    counts, before = Counts(), _num_graphs()
    is_gpu = device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught, _counted_binaries(counts), _counted_calls(counts.wait_names):
        warnings.simplefilter("always")
        if is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            if is_gpu:
                torch.cuda.set_sync_debug_mode("default")
            counts.graphs = _num_graphs() - before
            texts = [str(warning.message) for warning in caught]
            counts.wait_names += [text for text in texts if "synchronizing CUDA operation" in text]


@contextmanager
def _counted_calls(names: list[str]) -> Iterator[None]:
    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name, owner, attribute in WAITING_CALLS:
            replacement = recording(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, replacement))
        yield


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def _counted_binaries(counts: Counts) -> Iterator[None]:
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import knobs

    def count(**_: Any) -> None:
        counts.binaries += 1

    knobs.runtime.jit_post_compile_hook = count
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = None
