"""The three products of the output head in PyTorch: logits, gradient of hidden states, and gradient of the weight.

On a CPU they use the faster of PyTorch's two libraries.

PyTorch computes float32 products with MKL, which uses AVX2 only on processors that are not Intel's. On these, oneDNN,
part of the same build, uses AVX-512 for logits and dHidden; dWeight stays with MKL, because oneDNN's would need a
transposed copy (docs/kernels.md has the times). oneDNN's operator allocates the result and copies operands that are not
dense, so it is called for one block of the vocabulary at a time, small enough to keep these in the cache.

Letters: n rows of a chunk, V vocabulary, H hidden.
"""

import math
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._compat import onednn_linear

# size of the result of one product, [n, columns] or [columns, H]: it should stay in the cache, but each block costs
# some thread barriers, which are slow while other processes use the cores
BLOCK_BYTES = 2**21
# about how many terms of a float32 dot product share a running sum, whose rounding error grows with them. MKL uses 256;
# 128 reduces the error of log-probs and gradients by a quarter and costs a few percent of the time
TERMS_AT_ONCE = 128
LEAST_COLUMNS = 128  # the gain of a narrower product is less than the cost of the copies
MOST_ROWS_WITH_GRADIENT = 7 / 8  # of a chunk: moving more costs as much as the products of the others
LEAST_MOVED = 2**22  # logits of a chunk: products of fewer are fast enough
ROWS_MOVED_AT_ONCE = 64
LEAST_LAZY_BYTES = 2**24
LEAST_PADDED_COLUMNS = 1024  # in shorter rows, padding costs an elementwise pass more than it saves


class WideProducts:
    """Operands and results in one dtype; a head stored in a narrower dtype is cast block by block of the vocabulary."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def empty_logits(self, num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
        """Memory for the logits of a chunk."""
        return empty_rows(num_rows, vocab_size, self.dtype, device)

    def grad_memory(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits' own memory, and no `rounding_residual`."""
        return logits, None

    def operand(self, tensor: Tensor) -> Tensor:
        """Hidden states or a bias, cast to the dtype of the products."""
        return tensor.to(self.dtype)

    def write_logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        """out [n, V] = scale * (hidden [n, H] @ weight [V, H].T + bias [V])."""
        for block, some_weight in widened(weight, self.dtype):
            write_logits(out[:, block], hidden, some_weight, None if bias is None else bias[block], scale)

    def grad_operand(self, grad_logits: Tensor) -> Tensor:
        """dL/dlogits themselves."""
        return grad_logits

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor) -> Tensor:
        """grad_logits [n, V] @ weight [V, H]."""
        made = torch.zeros(grad_logits.shape[0], weight.shape[1], dtype=self.dtype, device=grad_logits.device)
        for block, some_weight in widened(weight, self.dtype):
            add_to_hidden(made, grad_logits[:, block], some_weight)
        return made

    def add_grad_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
        """total [V, H] += grad_logits [n, V].T @ hidden [n, H]; `is_first` overwrites what `total` holds."""
        add_to_weight(total, grad_logits, hidden, is_first=is_first)


def write_logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """out [n, V] = scale * (hidden [n, H] @ weight [V, H].T + bias [V]).

    With oneDNN, the bits of a row depend neither on the other rows nor on the blocks.
    """
    if not _goes_through_onednn(out):
        is_split = _is_float32_on_cpu(out)
        hidden_size = max(hidden.shape[1], 1)
        num_terms = -(-hidden_size // max(round(hidden_size / TERMS_AT_ONCE), 1)) if is_split else hidden_size
        for block in column_blocks(out, max(hidden.shape[0], 1)) if is_split else [slice(None)]:
            some_bias = None if bias is None else bias[block]
            _add_up_terms(out[:, block], hidden, weight[block], some_bias, scale, num_terms)
        return
    num_rows = hidden.shape[0]
    if num_rows == 1:
        hidden = hidden.expand(2, -1).contiguous()  # oneDNN sums in a different order if there is only one row
    for block in column_blocks(out, num_rows):
        part = onednn_linear(hidden, weight[block].contiguous(), None if bias is None else bias[block])
        torch.mul(part[:num_rows], scale, out=out[:, block])


def add_to_hidden(total: Tensor, grad_logits: Tensor, weight: Tensor) -> None:
    """total [n, H] += grad_logits [n, V] @ weight [V, H]."""
    if not _goes_through_onednn(grad_logits):
        total.addmm_(grad_logits, weight)
        return
    for block in column_blocks(grad_logits, grad_logits.shape[0]):
        total.add_(onednn_linear(grad_logits[:, block], weight[block].contiguous().T))


def add_to_weight(total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """total [V, H] += grad_logits [n, V].T @ hidden [n, H]; `is_first` overwrites what `total` holds."""
    if is_first:
        torch.mm(grad_logits.T, hidden, out=total)
    else:
        total.addmm_(grad_logits.T, hidden)


def empty_rows(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory [num_rows, num_columns]; the stride of long rows is an odd number of cache lines.

    Rows whose stride is a power of two map to the same cache set, which makes a transposed copy six times slower.
    """
    stride = num_columns
    if num_columns >= LEAST_PADDED_COLUMNS:
        line = 64 // dtype.itemsize
        stride = (-(-num_columns // line) | 1) * line
    return torch.empty(num_rows, stride, dtype=dtype, device=device)[:, :num_columns]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the operating system provides a page of memory only when it is used."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < LEAST_LAZY_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # freed with the tensor
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def rows_with_gradient(scale: Tensor, vocab_size: int) -> Tensor | None:
    """The rows whose scale [n] is not 0, ascending; None if products without the others would not be faster.

    On a GPU the host does not know the scale.
    """
    if scale.device.type != "cpu" or scale.numel() * vocab_size < LEAST_MOVED:
        return None
    rows = scale.nonzero().squeeze(1)
    return rows if rows.numel() <= MOST_ROWS_WITH_GRADIENT * scale.numel() else None


def compact_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Move the rows `rows` (ascending) of `values` [n, V] to its front, in place; returns these."""
    is_moved = rows != torch.arange(rows.numel(), device=rows.device)
    first = int((~is_moved).sum())  # a row that is not at its place is followed by others that are not
    for start in range(first, rows.numel(), ROWS_MOVED_AT_ONCE):
        some = rows[start : start + ROWS_MOVED_AT_ONCE]
        values[start : start + some.numel()] = values[some]
    return values[: rows.numel()]


def widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in that dtype: whole if it is stored so, else cast block by block of the vocabulary."""
    vocab_size, hidden_size = weight.shape
    if weight.dtype == dtype:
        yield slice(0, vocab_size), weight
        return
    step = _launch.widen_rows(hidden_size, dtype.itemsize)
    for start in range(0, vocab_size, step):
        block = slice(start, min(start + step, vocab_size))
        yield block, weight[block].to(dtype)


def _add_up_terms(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, num_terms: int
) -> None:
    """`write_logits` as a sum of products over `num_terms` of the H features each."""
    parts = zip(torch.split(hidden, num_terms, dim=1), torch.split(weight, num_terms, dim=1), strict=True)
    for number, (left, right) in enumerate(parts):
        if number > 0:
            out.addmm_(left, right.T, alpha=scale)
        elif bias is None:
            torch.addmm(out, left, right.T, beta=0.0, alpha=scale, out=out)
        else:
            torch.addmm(bias, left, right.T, beta=scale, alpha=scale, out=out)


def column_blocks(rows: Tensor, values_per_column: int) -> Iterator[slice]:
    """Slices of the vocabulary for rows [n, V], each of about `BLOCK_BYTES` with that many values per column."""
    vocab_size = rows.shape[1]
    columns = BLOCK_BYTES // (values_per_column * rows.dtype.itemsize)
    columns = max(LEAST_COLUMNS, columns // LEAST_COLUMNS * LEAST_COLUMNS)
    for start in range(0, vocab_size, columns):
        yield slice(start, min(start + columns, vocab_size))


def _goes_through_onednn(rows: Tensor) -> bool:
    is_large = rows.shape[0] > 0 and rows.shape[1] >= LEAST_COLUMNS
    return is_large and _is_float32_on_cpu(rows) and _launch.onednn_is_faster()


def _is_float32_on_cpu(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and rows.device.type == "cpu"
