"""Weights packed into large buffers, so that a transfer consists of few large messages."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; a view of a byte buffer as another dtype must start at a multiple of the element size


@dataclass(frozen=True)
class Bucket:
    """Weights concatenated in one buffer.

    Args:
        data: [num_bytes] uint8.
        names: of the weights, in order.
        dtypes: of each weight, as torch names it: "bfloat16".
        shapes: of each weight.
    """

    data: Tensor
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def manifest(self) -> str:
        """All but the data, as JSON."""
        return json.dumps([self.names, self.dtypes, self.shapes])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by name, as views of the data."""
        offsets = _layout(self.dtypes, self.shapes)
        for name, dtype, shape, (start, end) in zip(self.names, self.dtypes, self.shapes, offsets, strict=True):
            yield name, self.data[start:end].view(getattr(torch, dtype)).view(shape)

    def copy_to_cpu(self) -> "Bucket":
        """A copy in the host's memory."""
        return Bucket(self.data.to("cpu", copy=True), self.names, self.dtypes, self.shapes)


def empty_bucket(manifest: str, device: torch.device) -> Bucket:
    """A bucket for what `Bucket.manifest` describes, with uninitialised data."""
    names, dtypes, shapes = json.loads(manifest)
    num_bytes = max((end for _, end in _layout(dtypes, shapes)), default=0)
    return Bucket(torch.empty(num_bytes, dtype=torch.uint8, device=device), names, dtypes, shapes)


def fill_buckets(weights: Iterable[tuple[str, Tensor]], device: torch.device, num_bytes: int) -> Iterator[Bucket]:
    """Copies the weights into buckets; each bucket is valid until the next is requested, which reuses its buffer.

    Args:
        weights: names and tensors; each tensor is copied before the next is requested.
        device: of the buckets.
        num_bytes: of a bucket; a larger weight enlarges its bucket and those after it to its own size.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    names, dtypes, shapes, used = _no_weights()
    for name, value in weights:
        start = _aligned(used)
        size = value.numel() * value.element_size()
        if names and start + size > len(buffer):
            yield Bucket(buffer[:used], names, dtypes, shapes)
            (names, dtypes, shapes, used), start = _no_weights(), 0
        if size > len(buffer):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        used = start + size
        buffer[start:used].view(value.dtype).view(value.shape).copy_(value.detach())
        names.append(name)
        dtypes.append(str(value.dtype).removeprefix("torch."))
        shapes.append(list(value.shape))
    if names:
        yield Bucket(buffer[:used], names, dtypes, shapes)


def _no_weights() -> tuple[list[str], list[str], list[list[int]], int]:
    return [], [], [], 0


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _layout(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The first byte of each weight, and the byte after its last."""
    offsets, end = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        start = _aligned(end)
        end = start + torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        offsets.append((start, end))
    return offsets
