"""Samples of weights, by which the copies of two processes are compared exactly.

A sample takes the elements at indices that depend on the shape alone: all of a norm's, and so many of an embedding's
that a skipped sync is found even if an update is so small that most elements round to the same value.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

NUM_SAMPLED = 4096  # most elements of a weight in its sample
COMPARED = ("float64", "float32", "bfloat16", "float16")  # quantised weights have other values and a scale


class WeightDescription(TypedDict):
    """A weight as JSON: its shape, its dtype, and a digest of its sample in that dtype."""

    shape: list[int]
    dtype: str
    digest: str


class Comparison(NamedTuple):
    """The number of weights that both sides have with the same name and shape, and the names of those that differ."""

    num_compared: int
    differing: list[str]


def describe(weights: Iterable[tuple[str, Tensor]]) -> dict[str, WeightDescription]:
    """The descriptions of weights by name."""
    return {
        name: WeightDescription(
            shape=list(weight.shape), dtype=str(weight.dtype).removeprefix("torch."), digest=_digest(_sample(weight))
        )
        for name, weight in weights
    }


class WeightSamples:
    """Samples of the policy's weights, taken while an engine iterates over them.

    Args:
        earlier: samples of further weights, which stay as they are; None: there are none.
    """

    def __init__(self, earlier: "WeightSamples | None" = None) -> None:
        self._samples: dict[str, tuple[list[int], Tensor]] = {} if earlier is None else dict(earlier._samples)

    def record(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the same weights and samples each."""
        for name, weight in weights:
            self._samples[name] = (list(weight.shape), _sample(weight))
            yield name, weight

    def compare(self, engine_weights: Mapping[str, WeightDescription]) -> Comparison:
        """Compares the samples, rounded to the engine's dtypes, with the engine's weights.

        Weights that the engine fuses, shards or packs have other names or shapes there and are not compared.
        """
        same = {
            name: _digest(self._samples[name][1].to(getattr(torch, found["dtype"]))) == found["digest"]
            for name, found in engine_weights.items()
            if found["dtype"] in COMPARED and name in self._samples and self._samples[name][0] == found["shape"]
        }
        return Comparison(len(same), [name for name, is_same in same.items() if not is_same])


def _sample(weight: Tensor) -> Tensor:
    """NUM_SAMPLED evenly spaced elements, or all if there are fewer, on the CPU."""
    count = min(weight.numel(), NUM_SAMPLED)
    indices = torch.arange(count, device=weight.device) * weight.numel() // max(count, 1)
    return weight.detach()[torch.unravel_index(indices, weight.shape)].reshape(-1).cpu()


def _digest(sample: Tensor) -> str:
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
