"""The device that is measured on, and the rounds of a case: in each of them every contender runs once.

What else the machine does at a time falls on all that run in that round, so times are compared within rounds alone: a
ratio of two contenders is the median over rounds of one's time by the other's.
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

SECONDS = {"cpu": 3.0, "cuda": 0.5}  # of all rounds of a case, times its contenders
ROUNDS = {"cpu": (3, 15), "cuda": (5, 20)}  # at least and at most, the same number for all contenders of a case
FLUSH_BYTES = 2**28  # written between rounds on a GPU: more than any L2 cache holds


class Machine:
    """A CPU, timed by the host's clock, or a GPU, timed by its events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.is_gpu else None

    def mark(self) -> Any:
        """A moment in the device's work."""
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
        """Returns when the device has nothing more to do."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def cool(self) -> None:
        """Empties a GPU's cache; on a CPU gives back what others freed, so that nobody finds memory ready for use."""
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
        """How many rounds of so many seconds fit what a case is given."""
        least, most = ROUNDS[self.device.type]
        return max(least, min(most, int(num_contenders * SECONDS[self.device.type] / max(seconds, 1e-6))))

    def extra_peak_mib(self, run: Callable[[], Any]) -> float:
        """MiB that `run` allocates beyond what is there, at most, on a GPU."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def trim_memory() -> None:
    """Gives memory that is free, but held by the C library, back to the system; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


Round = Callable[[], dict[str, float]]  # one round of one contender: milliseconds by part, "both" for the whole


class RoundRobin:
    """The rounds of a case; a call is one of them: the floor first, then every contender in an order drawn anew.

    Args:
        machine: what they run on.
        runs: one round of each contender, by its name in the case.
        floor: what runs before them; None: nothing.
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
        """How many run in each round, the floor aside."""
        return len(self._runs)

    def times(self) -> dict[Any, dict[str, Any]]:
        """Milliseconds of every round so far by contender and part, and the floor's; entry i is of round i."""
        floor = {} if self._floor is None else {"floor_ms": self._floor_ms}
        return {name: {"ms": ms, **floor} for name, ms in self._ms.items()}


def forward_and_backward(machine: Machine, run: Callable[[], Tensor], inputs: Inputs) -> Round:
    """A round of one contender, its forward and backward parts noted apart; its gradients are gone after it."""

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
    """A round that has no parts."""

    def once() -> dict[str, float]:
        start = machine.mark()
        run()
        return {"both": machine.ms(start, machine.mark())}

    return once
