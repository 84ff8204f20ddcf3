"""Chunks of logits as the engine hands them to the kernels, for tests that launch kernels themselves."""

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._head import Chunk, Exponentials, Span


def make_chunk(
    logits: Tensor,
    grad_logits: Tensor | None = None,
    *,
    order: Tensor | None = None,
    first_row: int = 0,
    residual: Tensor | None = None,
) -> Chunk:
    """A chunk of all rows of `logits`; their positions are `order[first_row:]`, or start at `first_row`."""
    rows = slice(first_row, first_row + logits.shape[:-1].numel())
    return Chunk(Span(rows, order), logits, grad_logits, rounding_residual=residual)


def make_exponential_chunk(
    vocab_size: int, num_rows: int = 2, *, order: Tensor | None = None, has_memory: bool = True
) -> Chunk:
    """A chunk whose exponentials are uninitialised; one tile of logits remains to be read."""
    columns = _launch.exponential_tile(vocab_size).block
    logits, padded = torch.empty(num_rows, columns), -(-vocab_size // 16) * 16
    memory = torch.empty(num_rows, padded, dtype=torch.bfloat16) if has_memory else None
    tiles = torch.empty(-(-vocab_size // columns), 6, num_rows)  # NUM_PARTS
    kept = Exponentials(memory, iter([logits]), vocab_size, None, tiles, torch.empty(num_rows))
    grad = None if memory is None else memory[:, :vocab_size]
    return Chunk(Span(slice(0, num_rows), order), logits, grad, exponentials=kept)
