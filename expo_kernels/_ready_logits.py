"""Rows of logits that the caller computed, and where their gradients go.

Letters: M positions of the caller's tensors, N rows, n of them in a chunk, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expo_kernels._head import Chunk, Gradients, Spans, take_rows, zeros_like
from expo_kernels._products import empty_rows


class CopiedLogits:
    """The caller's logits, copied into a float32 buffer one chunk at a time."""

    def __init__(
        self, logits: Tensor, dtype: torch.dtype, *, wants_grad: bool, inplace: bool = False, scale: float = 1.0
    ) -> None:
        self._logits, self._dtype, self._scale = logits.detach(), dtype, scale
        self._wants_grad, self._inplace = wants_grad, inplace
        self._buffer: Tensor | None = None
        self._grad: Tensor | None = None
        self._is_read: Tensor | None = None
        if wants_grad:
            self._grad = self._logits if inplace else zeros_like(self._logits, logits.dtype)
        if wants_grad and inplace:
            self._is_read = torch.zeros(logits.shape[:-1].numel(), dtype=torch.bool, device=logits.device)

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """Rows of logits times the scale; each chunk overwrites the one before."""
        if self._buffer is None:
            self._buffer = empty_rows(spans.most_rows, self._logits.shape[-1], self._dtype, self._logits.device)
        for span in spans.spans:
            logits = self._buffer[: span.rows.stop - span.rows.start]
            logits.copy_(take_rows(self._logits, span.positions(logits.device)))
            if self._scale != 1.0:
                logits.mul_(self._scale)
            yield Chunk(span, logits, logits if self._wants_grad else None)

    def accumulate_grads(self, chunk: Chunk) -> None:
        """Write the gradients of a chunk at their positions."""
        grad, positions = self._grad, chunk.span.positions(self._logits.device)
        assert grad is not None
        assert chunk.grad_logits is not None
        assert chunk.row_scale is not None
        part = chunk.grad_logits.mul_(chunk.row_scale.unsqueeze(1)).to(grad.dtype)
        if grad.dim() == 3:
            grad[positions // grad.shape[1], positions % grad.shape[1]] = part
        else:
            grad.index_copy_(0, positions, part)
        if self._is_read is not None:
            self._is_read[positions] = True

    def gradients(self) -> Gradients:
        """The gradient of the logits."""
        if self._grad is not None and self._is_read is not None:
            self._grad.masked_fill_(~self._is_read.view(*self._grad.shape[:-1], 1), 0.0)
        return None if self._grad is None else (self._grad,), None, None


class ReadyLogits:
    """The caller's logits, which kernels read in place, in one chunk; the gradient overwrites them or is separate."""

    def __init__(self, logits: Tensor, *, wants_grad: bool, inplace: bool = False) -> None:
        self._logits = logits if logits.stride(-1) == 1 and logits.dim() in (2, 3) else logits.contiguous()
        self._grad: Tensor | None = None
        if wants_grad:
            is_own_memory = inplace and self._logits.data_ptr() == logits.data_ptr()
            self._grad = (
                self._logits if is_own_memory else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            )

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """All rows."""
        for span in spans.spans:
            yield Chunk(span, self._logits, self._grad)

    def accumulate_grads(self, chunk: Chunk) -> None:
        """Nothing to do: the kernels wrote the gradient in place."""

    def gradients(self) -> Gradients:
        """The gradient of the logits."""
        return None if self._grad is None else (self._grad,), None, None
