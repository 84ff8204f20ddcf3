"""A head on a GPU whose gradient products leave out columns (see `_kept_columns_gpu.py`).

The size of these products is known on the device first. So that it never waits for the host, the products of a chunk
are launched after the next chunk's logits and dL/dlogits, when their size has long arrived. Two chunks of logits are in
memory therefore.

Letters: n rows of a chunk, V vocabulary, H hidden, k kept columns of one product.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expo_kernels._head import Chunk, Gradients, HeadCall, LinearHead, Spans
from expo_kernels._kept_columns_gpu import Choice, DeviceColumns
from expo_kernels._plans import HostCopy, is_captured
from expo_kernels._precision import has_float32_results

COLUMNS_AT_ONCE = 8192  # of the kept ones in one product, which bounds its memory
COLUMN_MULTIPLE = 64  # of the kept ones: tiles of matrix products


def leaves_out_columns(call: HeadCall, *, keeps_exponentials: bool, has_entropy_grad: bool) -> bool:
    """Whether the gradient products of this call leave out columns, if the kernels run; else they are exact.

    They are exact under CUDA graph capture, where the host cannot learn their size; with gradients of entropies, whose
    rows have both signs; with exponentials; and where 16-bit operands have no float32 results.
    """
    if call.gradient_tolerance == 0.0 or not any(call.wants_grad[:2]):
        return False
    device = call.completion_ids.device
    if keeps_exponentials or has_entropy_grad or is_captured(device):
        return False
    return all(has_float32_results(device, dtype) for dtype in (torch.bfloat16, torch.float16))


class KeptColumnsHead(LinearHead):
    """A head whose gradients have the columns that matter."""

    _columns: DeviceColumns | None = None
    _pending: tuple[Chunk, Choice] | None = None
    _spare: Tensor | None = None
    _bound: Tensor | None = None

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """Rows of logits; each chunk overwrites the one before the last."""
        for chunk in super().chunks(spans):
            yield chunk
            if self._completion_ids.numel() > spans.most_rows and self._buffer is not None:
                if self._spare is None:
                    vocab_size, device = len(self._weight), self._weight.device
                    self._spare = self._products.empty_logits(spans.most_rows, vocab_size, device)
                self._buffer, self._spare = self._spare, self._buffer

    def accumulate_grads(self, chunk: Chunk) -> None:
        """Choose the columns of a chunk, and add the gradients of the chunk before."""
        assert chunk.grad_logits is not None
        assert chunk.hidden is not None
        if self._columns is None:
            num_chunks = -(-self._completion_ids.numel() // len(chunk.hidden))
            wants_hidden, wants_weight, _ = self._wants_grad
            self._columns = DeviceColumns(self._weight, self._tolerance, (wants_hidden, wants_weight), num_chunks)
        ids = self._chosen_ids(chunk.span.positions(chunk.grad_logits.device))
        choice = self._columns.choose(chunk.grad_logits, chunk.hidden, ids)
        self._finish_pending()
        self._pending = chunk, choice

    def _finish_pending(self) -> None:
        if self._pending is None:
            return
        (chunk, choice), self._pending = self._pending, None
        counts = choice.num_kept.read()
        assert counts is not None
        vocab_size = len(self._weight)
        num_kept = min(-(-max(counts[0], 1) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE, vocab_size)
        part = self._add_dense(chunk) if counts[0] == vocab_size else self._add_kept(chunk, choice, num_kept)
        assert self._columns is not None
        assert chunk.hidden is not None
        self._columns.record(choice, part, len(chunk.hidden), counts[0] / vocab_size)

    def _add_dense(self, chunk: Chunk) -> Tensor | None:
        """Add the gradients of a chunk from all columns; return its rows of dHidden [n, H], if wanted."""
        super().accumulate_grads(chunk)
        if self._grad_hidden is None:
            return None
        positions = chunk.span.positions(self._grad_hidden.device)
        return self._grad_hidden.view(-1, self._grad_hidden.shape[-1]).index_select(0, positions)

    def _add_kept(self, chunk: Chunk, choice: Choice, num_kept: int) -> Tensor | None:
        """Add the gradients of a chunk from its first columns; return its rows of dHidden [n, H], if wanted."""
        grad_logits, hidden, products = chunk.grad_logits, chunk.hidden, self._products
        assert grad_logits is not None
        assert hidden is not None
        assert self._columns is not None
        wants_hidden, wants_weight, wants_bias = self._wants_grad
        positions = chunk.span.positions(grad_logits.device)
        in_float32 = self._float32_columns(chunk, positions)
        if wants_bias:
            self._add_grad_bias(grad_logits, None, in_float32)
        dropped_sums, part = choice.row_sums, None
        for columns in torch.split(choice.columns[:num_kept], COLUMNS_AT_ONCE):
            slopes = grad_logits.index_select(1, columns)  # [n, k]
            dropped_sums = dropped_sums - slopes.sum(dim=1, dtype=torch.float32)
            operand = products.grad_operand(slopes)
            if wants_hidden:
                some = products.grad_hidden(operand, self._weight.index_select(0, columns))
                part = some if part is None else part.add_(some)
            if wants_weight:
                rows = torch.empty(len(columns), hidden.shape[1], dtype=products.dtype, device=hidden.device)
                products.add_grad_weight(rows, operand, hidden, is_first=True)
                self._add_weight_rows(columns, rows)
        if part is not None:
            # the dropped columns count with the mean row of the head
            part.addr_(dropped_sums, self._columns.mean_row)
            for ids, grad in in_float32:
                part.addcmul_(self._weight[ids], grad.unsqueeze(1))
            self._put_grad_hidden(positions, part)
        if wants_weight:
            for ids, grad in in_float32:
                self._add_to_rows(ids, hidden, grad)
        return part

    def _add_weight_rows(self, columns: Tensor, rows: Tensor) -> None:
        """Add rows [k, H] to the rows `columns` [k] of dWeight, each of which is there once."""
        if self._grad_weight is None:
            self._grad_weight = self._zero_grad_weight()
        start = 0
        for part in self._grad_weight:
            local = columns - start
            is_elsewhere = (local < 0) | (local >= len(part))
            # those of another part add 0, so that the order of the additions does not matter
            part.index_add_(0, local % len(part), rows.masked_fill(is_elsewhere.unsqueeze(1), 0.0))
            start += len(part)

    def gradients(self) -> Gradients:
        """Gradients of hidden, weight and bias (None where not wanted), not yet in the inputs' dtypes."""
        self._finish_pending()
        self._spare = None
        return super().gradients()

    def tolerance_met(self) -> bool:
        """Whether the gradients are within the tolerance; the host waits for the answer if columns were left out."""
        self._finish_pending()
        if self._columns is None or self._columns.is_exact:
            return True
        self._bound = self._columns.error_bound(self._grad_weight)
        is_met = HostCopy((self._bound <= self._tolerance).long().view(1)).read()
        return is_met == [1]

    def gradient_report(self) -> tuple[float | Tensor, float]:
        """The bound on the gradients' relative error that `tolerance_met` found, and the share of columns in their
        products."""
        bound = 0.0 if self._bound is None else self._bound
        return bound, 1.0 if self._columns is None else self._columns.kept_share
