"""The device that is measured on: its clock, its cold cache, and rounds in which a contender is paired with a floor."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs

SECONDS = {"cpu": 4.0, "cuda": 0.5}  # given to the rounds of one contender on one case
ROUNDS = {"cpu": (3, 9), "cuda": (5, 20)}  # at least and at most
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
        """Empties a GPU's cache; on a CPU the floor that runs before every round leaves it alike for all."""
        if self._flushed is not None:
            self._flushed.zero_()

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self.cool()
        start = self.mark()
        run()
        return self.ms(start, self.mark())

    def num_rounds(self, ms: float) -> int:
        """How many rounds of `ms` milliseconds fit what one contender is given."""
        least, most = ROUNDS[self.device.type]
        return max(least, min(most, int(1e3 * SECONDS[self.device.type] / max(ms, 1e-3))))

    def extra_peak_mib(self, run: Callable[[], Any]) -> float:
        """MiB that `run` allocates beyond what is there, at most, on a GPU."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**20


@dataclass
class Pairs:
    """Rounds of a contender, each beside the floor that ran just before it; milliseconds."""

    machine: Machine
    floor: Callable[[], Any]
    floor_ms: list[float] = field(default_factory=list)
    ms: dict[str, list[float]] = field(default_factory=dict)

    def before(self) -> None:
        """What each round starts with."""
        self.floor_ms.append(self.machine.time(self.floor))
        self.machine.cool()
        self.machine.wait()

    def note(self, **ms: float) -> None:
        """Keeps what one round took."""
        for name, value in ms.items():
            self.ms.setdefault(name, []).append(value)

    def row(self, num_rounds: int) -> dict[str, Any]:
        """The last rounds, without those of the warm-up."""
        return {
            "ms": {name: values[-num_rounds:] for name, values in self.ms.items()},
            "floor_ms": self.floor_ms[-num_rounds:],
        }


def forward_and_backward(pairs: Pairs, run: Callable[[], Tensor], inputs: Inputs) -> Callable[[], None]:
    """A round of one contender, its forward and backward parts noted apart."""

    def once() -> None:
        inputs.clear()
        start = pairs.machine.mark()
        loss = run()
        middle = pairs.machine.mark()
        loss.backward()
        end = pairs.machine.mark()
        ms = pairs.machine.ms
        pairs.note(both=ms(start, end), forward=ms(start, middle), backward=ms(middle, end))

    return once


def whole(pairs: Pairs, run: Callable[[], Any]) -> Callable[[], None]:
    """A round that has no parts."""

    def once() -> None:
        start = pairs.machine.mark()
        run()
        pairs.note(both=pairs.machine.ms(start, pairs.machine.mark()))

    return once
