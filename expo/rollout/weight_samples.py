"""Samples of weights, by which two sides that should hold the same are compared exactly, whatever process each is in.

A sample is the elements at places that follow from the shape alone: all of a norm, of an embedding so many that a
sync left out shows even where an update is too small to round most elements anew.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

NUM_SAMPLED = 4096  # elements of a weight
COMPARED = ("float64", "float32", "bfloat16", "float16")  # what is stored in less has a scale beside it


class Described(TypedDict):
    """A weight, in JSON: its shape, its dtype, and a digest of its sample in that dtype."""

    shape: list[int]
    dtype: str
    digest: str


class Comparison(NamedTuple):
    """How many weights both sides have under one name and in one shape, and the names of those that differ."""

    num_compared: int
    differing: list[str]


def describe(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Described]:
    """Weights by name."""
    return {
        name: Described(
            shape=list(weight.shape), dtype=str(weight.dtype).removeprefix("torch."), digest=_digest(_sample(weight))
        )
        for name, weight in weights
    }


class WeightSamples:
    """Samples of the policy's weights, taken while these go past on their way to an engine."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[list[int], Tensor]] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, each sampled."""
        for name, weight in weights:
            self._taken[name] = (list(weight.shape), _sample(weight))
            yield name, weight

    def compare(self, held: Mapping[str, Described]) -> Comparison:
        """The samples rounded to the dtypes of an engine's weights against these; what was fused, cut or packed there
        has other names or shapes, and is left out.
        """
        same = {
            name: _digest(self._taken[name][1].to(getattr(torch, found["dtype"]))) == found["digest"]
            for name, found in held.items()
            if found["dtype"] in COMPARED and name in self._taken and self._taken[name][0] == found["shape"]
        }
        return Comparison(len(same), [name for name, is_same in same.items() if not is_same])


def _sample(weight: Tensor) -> Tensor:
    """NUM_SAMPLED elements spread evenly, or all, on the CPU."""
    count = min(weight.numel(), NUM_SAMPLED)
    places = torch.arange(count, device=weight.device) * weight.numel() // max(count, 1)
    return weight.detach()[torch.unravel_index(places, weight.shape)].reshape(-1).cpu()


def _digest(sample: Tensor) -> str:
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
