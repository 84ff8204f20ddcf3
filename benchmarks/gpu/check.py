"""What a check is: a target, and a function that yields measures; and where it runs, on a GPU or as a rehearsal."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

Size = TypeVar("Size")


class NeedsGPUError(Exception):
    """A rehearsal has reached what only a GPU can do; the message names it."""


class NotHereError(Exception):
    """The check does not apply to this machine: a package or a second device is missing."""


@dataclass(frozen=True)
class Place:
    """Where a check runs: a GPU, or for a rehearsal a CPU with tiny sizes and kernels in Triton's interpreter."""

    device: torch.device
    is_rehearsal: bool = False

    def size(self, on_gpu: Size, in_rehearsal: Size) -> Size:
        """The size to use."""
        return in_rehearsal if self.is_rehearsal else on_gpu

    def require_gpu(self, what: str) -> None:
        """Ends a rehearsal here. Raises: NeedsGPUError in a rehearsal."""
        if self.is_rehearsal:
            raise NeedsGPUError(what)


@dataclass(frozen=True)
class Measure:
    """One number of a check; a `bound` of None means that it is only reported."""

    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    is_minimum: bool = False  # whether the value must be at least the bound, not at most

    @property
    def is_met(self) -> bool:
        """Whether the value keeps the bound; a NaN keeps none."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.is_minimum else self.value <= self.bound

    def record(self) -> dict[str, Any]:
        """The measure as JSON, in which NaN and infinity are texts."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "is_met": self.is_met}

    def __str__(self) -> str:
        limit = "" if self.bound is None else f" ({'at least' if self.is_minimum else 'at most'} {self.bound:.4g})"
        return f"{self.name}: {self.value:.4g} {self.unit}".rstrip() + limit


Measures = Iterator[Measure]


@dataclass(frozen=True)
class Check:
    """A named check; `seconds` is its own time limit on a GPU."""

    target: str
    run: Callable[[Place], Measures]
    seconds: float = 60.0


def require_package(name: str) -> None:
    """Raises: NotHereError if the package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise NotHereError(f"{name} is not installed")
