"""Chunks of logits as the engine hands them to the kernels, for tests that launch kernels themselves."""

from torch import Tensor

from expo_kernels._head import Chunk, Span


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
