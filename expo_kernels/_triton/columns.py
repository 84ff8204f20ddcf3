"""Triton kernel over the columns of dL/dlogits: their squared norms, which say what columns a gradient needs.

Letters: n rows of a chunk, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._triton.device import kernel
from expo_kernels._triton.launch import alignment_of


@kernel
def column_squares_kernel(
    grad_ptr,  # [n, V], any float dtype
    unit_ptr,  # 0-dim float32
    squares_ptr,  # [V] float32, out
    num_rows,
    row_stride,
    vocab_size,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """squares_j = sum over i of (grad_ij / unit)^2; one program has BLOCK_V columns and adds their rows in order."""
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_N)
    row_stride = tl.cast(row_stride, tl.int64) * ALIGNMENT
    vocab_size = vocab_size * ALIGNMENT
    inverse = 1.0 / tl.load(unit_ptr)
    squares = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, num_rows, BLOCK_N):
        is_row = first + rows < num_rows
        offset = (first + rows).to(tl.int64)[:, None] * row_stride + columns[None, :]
        tile = tl.load(grad_ptr + offset, mask=is_row[:, None] & (columns < vocab_size)[None, :], other=0.0)
        scaled = tile.to(tl.float32) * inverse
        squares += scaled * scaled
    tl.store(squares_ptr + columns, tl.sum(squares, axis=0), mask=columns < vocab_size)


def launch_column_squares(grad_logits: Tensor, unit: Tensor) -> Tensor:
    """The squared norm of each column of grad_logits [n, V] / unit (0-dim), [V] float32."""
    num_rows, vocab_size = grad_logits.shape
    assert grad_logits.stride(1) == 1
    squares = torch.empty(vocab_size, dtype=torch.float32, device=grad_logits.device)
    alignment, tile = alignment_of(grad_logits), _launch.column_tile()
    with _launch.current(grad_logits.device):
        column_squares_kernel[(triton.cdiv(vocab_size, tile.num_columns),)](
            grad_ptr=grad_logits,
            unit_ptr=unit,
            squares_ptr=squares,
            num_rows=num_rows,
            row_stride=grad_logits.stride(0) // alignment,
            vocab_size=vocab_size // alignment,
            ALIGNMENT=alignment,
            BLOCK_N=tile.num_rows,
            BLOCK_V=tile.num_columns,
            num_warps=tile.num_warps,
        )
    return squares
