"""Gradients are summed in float32 and rounded once to the dtype of their input, with the incoming gradient.

A head's float32 dWeight takes 4VH bytes, and a bfloat16 copy of it 2VH more. On a GPU the sum is therefore two tensors
of half the rows each: the narrow gradient fits the first one's memory, and the second one's is freed with the graph.
Gradients of hidden states are narrowed into new memory; the chunk of logits, which is larger, is gone by then.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expo_kernels import _launch

# elements copied before the first ones are overwritten; each of the slices that follow is as long as all before it
COPIED_AT_ONCE = 2**20
ROW_ALIGNMENT = 64  # rows of dWeight, which are columns of dL/dlogits: so that products read whole cache lines


def part_shapes(weight: Tensor, dtype: torch.dtype | None = None) -> list[tuple[int, int]]:
    """Shapes of the tensors that hold the sum of a weight's gradient [V, H]: two on a GPU if it will be narrow.

    `dtype` is the gradient's, by default the weight's.
    """
    num_rows, hidden_size = weight.shape
    half = -(-num_rows // (2 * ROW_ALIGNMENT)) * ROW_ALIGNMENT
    if (dtype or weight.dtype).itemsize > 2 or not _launch.use_kernels(weight) or half >= num_rows:
        return [(num_rows, hidden_size)]
    return [(half, hidden_size), (num_rows - half, hidden_size)]


def grouped(tensors: Sequence[Tensor], num_rows: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Consecutive tensors whose rows add up to these numbers."""
    rest = iter(tensors)
    for wanted in num_rows:
        parts = [next(rest)]
        while sum(part.shape[0] for part in parts) < wanted:
            parts.append(next(rest))
        yield tuple(parts)


def narrowed(parts: Sequence[Tensor], dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """The gradient, times `factor` if given, in the input's dtype; several parts are overwritten by it."""

    def write(out: Tensor, part: Tensor) -> None:
        if factor is None:
            out.copy_(part)
        else:
            torch.mul(part, factor, out=out)

    first, *others = parts
    if not others:
        if first.dtype == dtype and factor is None:
            return first
        made = torch.empty_like(first, dtype=dtype)
        write(made, first)
        return made
    wide, narrow = first.view(-1), first.view(dtype).view(-1)
    done = min(COPIED_AT_ONCE, wide.numel())
    write(narrow[:done], wide[:done].clone())
    while done < wide.numel():
        # the result takes at most half of the bytes, so these elements land where all have been read
        stop = min(2 * done, wide.numel())
        write(narrow[done:stop], wide[done:stop])
        done = stop
    for part in others:
        write(narrow[done : done + part.numel()], part.view(-1))
        done += part.numel()
    return narrow[:done].view(-1, *first.shape[1:])
