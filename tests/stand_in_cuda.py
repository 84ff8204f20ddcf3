"""Stand-ins for the functions of torch.cuda that the checks call, so that their code for GPUs runs on CPU tensors.

They show errors in that code, such as a wrong name or argument; the measured values mean nothing.
"""

import time
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch

from benchmarks import events
from benchmarks.gpu.check import Place


class GPUPlace(Place):
    """A GPU by name, with the sizes of a rehearsal."""

    def size(self, on_gpu, in_rehearsal):
        return in_rehearsal


class Event:
    def __init__(self, enable_timing=False):
        self.seconds = 0.0

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


class CUDAGraph:
    def replay(self):
        pass


FUNCTIONS = {
    **{"Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "_sleep": int, "empty_cache": lambda: None},
    **{"stream": nullcontext, "graph": nullcontext, "current_stream": Stream, "synchronize": lambda device=None: None},
    **{"memory_allocated": lambda device: 0, "max_memory_allocated": lambda device: 2**20},
    "reset_peak_memory_stats": lambda device: None,
}


@contextmanager
def stand_in_cuda():
    with ExitStack() as patches:
        for name, replacement in FUNCTIONS.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, replacement))
        calls = [
            (name, {"Event": Event, "Stream": Stream}.get(name.split(".")[2], torch.cuda), "synchronize")
            for name, *_ in events.WAITING_CALLS
        ]
        patches.enter_context(mock.patch.object(events, "WAITING_CALLS", calls))
        yield
