"""The device of the measurements, and the rounds of a case: in each round every contender runs once.

Other load on the machine affects all contenders of a round, so times are compared within rounds only: the ratio of two
contenders is the median over rounds of the ratio of their times.
"""

import ctypes
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs

SECONDS = {"cpu": 3.0, "cuda": 0.5}  # for all rounds of a case, per contender
ROUNDS = {"cpu": (3, 15), "cuda": (5, 20)}  # minimum and maximum of a case
FLUSH_BYTES = 2**28  # written between runs on a GPU to flush the L2 cache; larger than any L2 cache


class Machine:
    """A CPU, timed by the host's clock, or a GPU, timed by CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.is_gpu else None

    def mark(self) -> Any:
        """A time mark: the host's clock on a CPU, a recorded event on a GPU."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the device."""
        if not self.is_gpu:
            return 1e3 * (end - start)
        end.synchronize()
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        """Waits until the device is idle."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def cool(self) -> None:
        """Flushes a GPU's L2 cache; on a CPU returns freed memory to the system, so that no contender can reuse it."""
        if self._flushed is not None:
            self._flushed.zero_()
        elif sys.platform == "linux":
            trim_memory()

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self.cool()
        start = self.mark()
        run()
        return self.ms(start, self.mark())

    def num_rounds(self, seconds: float, num_contenders: int) -> int:
        """The number of rounds of `seconds` each that fit the time of a case."""
        fewest, most = ROUNDS[self.device.type]
        return max(fewest, min(most, int(num_contenders * SECONDS[self.device.type] / max(seconds, 1e-6))))

    def extra_peak_mib(self, run: Callable[[], Any]) -> float:
        """Peak MiB that `run` allocates on a GPU in addition to existing memory."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def trim_memory() -> None:
    """Returns freed memory from the C library's allocator to the system; works with glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


Round = Callable[[], dict[str, float]]  # one round of one contender: milliseconds by part, "both" for the total


class RoundRobin:
    """The rounds of a case; a call executes one: the floor first, then every contender in random order.

    Args:
        machine: the device.
        runs: one round of each contender, by its name.
        floor: the lower bound, which runs first; None for no floor.
    """

    def __init__(self, machine: Machine, runs: Mapping[Any, Round], floor: Callable[[], Any] | None = None) -> None:
        self._machine, self._runs, self._floor = machine, dict(runs), floor
        self._random = random.Random(0)
        self._floor_ms: list[float] = []
        self._ms: dict[Any, dict[str, list[float]]] = {name: {} for name in runs}

    def __call__(self) -> None:
        if self._floor is not None:
            self._floor_ms.append(self._machine.time(self._floor))
        for name in self._random.sample(list(self._runs), len(self._runs)):
            self._machine.cool()
            self._machine.wait()
            for part, ms in self._runs[name]().items():
                self._ms[name].setdefault(part, []).append(ms)

    @property
    def num_contenders(self) -> int:
        """Contenders in each round, without the floor."""
        return len(self._runs)

    def times(self) -> dict[Any, dict[str, Any]]:
        """Milliseconds by contender and part, and those of the floor; entry i belongs to round i."""
        floor = {} if self._floor is None else {"floor_ms": self._floor_ms}
        return {name: {"ms": ms, **floor} for name, ms in self._ms.items()}


def forward_and_backward(machine: Machine, run: Callable[[], Tensor], inputs: Inputs) -> Round:
    """A round of one contender with separate times of forward and backward; gradients are cleared afterwards."""

    def once() -> dict[str, float]:
        inputs.clear()
        start = machine.mark()
        loss = run()
        middle = machine.mark()
        loss.backward()
        end = machine.mark()
        ms = {"both": machine.ms(start, end), "forward": machine.ms(start, middle), "backward": machine.ms(middle, end)}
        inputs.clear()
        return ms

    return once


def whole(machine: Machine, run: Callable[[], Any]) -> Round:
    """A round with the total time only."""

    def once() -> dict[str, float]:
        start = machine.mark()
        run()
        return {"both": machine.ms(start, machine.mark())}

    return once
