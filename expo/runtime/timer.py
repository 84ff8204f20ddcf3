"""Wall-clock seconds of each phase of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class PhaseTimer:
    """Wall-clock seconds of a step, by phase.

    Args:
        guard: returns the context in which the phase of that name runs, such as a watchdog's.
        waits_for_gpu: whether a phase ends with the work that it has queued on the GPU.
    """

    def __init__(
        self, guard: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(), waits_for_gpu: bool = True
    ) -> None:
        self._guard, self._waits_for_gpu = guard, waits_for_gpu and torch.cuda.is_available()
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside, work on the GPU included, to the phase `name`."""
        started = time.perf_counter()
        with self._guard(name):
            yield
            if self._waits_for_gpu:
                torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds_of(self, name: str) -> float:
        """Seconds spent in a phase so far."""
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        """Seconds since the timer was created."""
        return time.perf_counter() - self._started

    def metrics(self) -> dict[str, float]:
        """`seconds` since the timer was created, and `seconds/<phase>` of each phase."""
        phases = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        return {"seconds": self.total(), **phases}
