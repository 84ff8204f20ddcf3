"""Triton kernels of a head that keeps bfloat16 exponentials of its logits: dL/dlogits.

The exponentials 2^(z - k) become the operand of the head's products: dL/dlogit_j is a factor per row times 2^(z_j - k).
Two columns of a row are left out of the operand, the chosen one and the most probable of the others: where a policy is
nearly certain they hold the norm of the row, so the head adds their gradients in float32.

In the few rows whose k changes from tile to tile, the tiles before the last change are multiplied by a power of two,
which rounds nothing. Logs of exponentials, which gradients of entropies need, are overwritten by dL/dlogits.

Letters: n rows of one launch, V vocabulary, M positions of the caller's tensors. Rows as in `rows.py`, tiles of BLOCK_V
columns as in `exponentials.py`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton
import triton.language as tl

from expo_kernels._triton.device import kernel
from expo_kernels._triton.exponentials import (
    EXPONENT,
    LARGEST_LOG,
    LN_2,
    LOG_STEPS,
    NUM_PARTS,
    OTHER,
    OTHER_ID,
    TOP,
)
from expo_kernels._triton.row import LOG2_E, capped, locate, temperature_of
from expo_kernels._triton.slots import LOGIT_SOFTCAP


@triton.jit
def _most_probable_other(tiles_ptr, row, num_rows, num_tiles, moves, BLOCK_TILES: tl.constexpr):
    """The largest logit of a row but for the chosen one, before the softcap, and its column."""
    largest = tl.full([], float("-inf"), tl.float32)
    column = tl.full([], 0, tl.int32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        part_ptr = tiles_ptr + tile.to(tl.int64) * NUM_PARTS * num_rows + row
        is_tile = tile < tl.where(moves, num_tiles, 0)
        others = tl.load(part_ptr + OTHER * num_rows, mask=is_tile, other=float("-inf"))
        columns = tl.load(part_ptr + OTHER_ID * num_rows, mask=is_tile, other=0.0).to(tl.int32, bitcast=True)
        of_block, at = tl.max(others, axis=0, return_indices=True)
        of_column = tl.sum(tl.where(tile == first + at, columns, 0), axis=0)
        column = tl.where(of_block > largest, of_column, column)
        largest = tl.maximum(largest, of_block)
    return largest, column


@triton.jit
def _grad_of_column(
    logit, onehot, grad_logp, grad_entropy, row_max, sum_exp, entropy, temperature_ptr, hyper_ptr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """dL/dlogit of one column in float32, from its logit before the softcap."""
    temperature = tl.load(temperature_ptr)
    cap_grad = 1.0
    if HAS_SOFTCAP:
        logit, cap_grad = capped(logit, tl.load(hyper_ptr + LOGIT_SOFTCAP))
    prob = tl.exp2((logit - row_max) * (LOG2_E / temperature)) / sum_exp
    grad = grad_logp * (onehot - prob)
    if HAS_ENTROPY:
        logp = (logit - row_max) / temperature - tl.log(sum_exp)
        grad -= grad_entropy * tl.where(prob == 0, 0.0, prob * (logp + entropy))
    return grad * cap_grad


@triton.jit
def _row_grad(
    row, keep, position, tiles_ptr, chosen_ptr, residual_ptr, other_grad_ptr, other_id_ptr, row_max_ptr, sum_exp_ptr,
    grad_logps_ptr, entropies_ptr, grad_entropies_ptr, temperature_ptr, hyper_ptr, num_rows, vocab_size, num_tiles,
    HAS_SOFTCAP: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the two columns that are left out of the operand. Return whether the row has a gradient,
    dL/dlogp and dL/dentropy over the temperature, row maximum, sum, entropy, and the column besides the chosen one."""
    HAS_ENTROPY: tl.constexpr = grad_entropies_ptr is not None
    temperature = tl.load(temperature_ptr)
    grad_logp = tl.load(grad_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
    entropy = tl.full([], 0.0, tl.float32)
    grad_entropy = entropy
    moves = grad_logp != 0
    if HAS_ENTROPY:
        entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
        grad_entropy = tl.load(grad_entropies_ptr + position, mask=keep, other=0.0).to(tl.float32)
        moves = moves | (grad_entropy != 0)
    moves = keep & moves
    grad_logp = tl.where(moves, grad_logp, 0.0) / temperature
    grad_entropy = tl.where(moves, grad_entropy, 0.0) / temperature
    row_max = tl.load(row_max_ptr + position, mask=moves, other=0.0)
    sum_exp = tl.load(sum_exp_ptr + position, mask=moves, other=1.0)
    chosen = tl.load(chosen_ptr + row, mask=moves, other=0.0)
    other, other_id = _most_probable_other(tiles_ptr, row, num_rows, num_tiles, moves, BLOCK_TILES)
    chosen_grad = _grad_of_column(
        chosen, 1.0, grad_logp, grad_entropy, row_max, sum_exp, entropy, temperature_ptr, hyper_ptr, HAS_SOFTCAP,
        HAS_ENTROPY,
    )  # fmt: skip
    other_grad = _grad_of_column(
        other, 0.0, grad_logp, grad_entropy, row_max, sum_exp, entropy, temperature_ptr, hyper_ptr, HAS_SOFTCAP,
        HAS_ENTROPY,
    )  # fmt: skip
    tl.store(residual_ptr + row, tl.where(moves, chosen_grad, 0.0))
    tl.store(other_grad_ptr + row, tl.where(moves, other_grad, 0.0))
    # rows without a gradient name different columns, because equal ones are added one by one
    tl.store(other_id_ptr + row, tl.where(moves, other_id, row % vocab_size).to(tl.int64))
    return moves, grad_logp, grad_entropy, row_max, sum_exp, entropy, other_id


@kernel
def exponential_grads_kernel(
    exponentials_ptr,  # [n, V] bfloat16: in, and the operand of the products out
    row_scale_ptr,  # [n] float32, out: dL/dlogits = row_scale * exponentials, but for two columns, which are set to 0
    residual_ptr,  # [n] float32, out: dL/dlogit of the chosen column
    other_grad_ptr,  # [n] float32, out: dL/dlogit of the most probable other column
    other_id_ptr,  # [n] int64, out: that column
    tiles_ptr,  # [num_tiles, NUM_PARTS, n] float32
    chosen_ptr,  # [n] float32
    row_max_ptr,  # [M] as written by `combine_tiles_kernel`
    sum_exp_ptr,  # [M]
    grad_logps_ptr,  # [M] float32
    order_ptr,
    mask_ptr,
    ids_ptr,
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    exponentials_row_stride,
    vocab_size,
    num_tiles,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The operand and the row scale that together are dL/dlogits, a row per program."""
    row = tl.program_id(0)
    position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
    temperature_ptr = temperature_of(position, temperatures_ptr, hyper_ptr)
    moves, grad_logp, _, row_max, sum_exp, _, other_id = _row_grad(
        row, keep, position, tiles_ptr, chosen_ptr, residual_ptr, other_grad_ptr, other_id_ptr, row_max_ptr,
        sum_exp_ptr, grad_logps_ptr, None, None, temperature_ptr, hyper_ptr, num_rows, vocab_size, num_tiles,
        HAS_SOFTCAP, BLOCK_TILES,
    )  # fmt: skip
    exponents_ptr = tiles_ptr + EXPONENT * num_rows + row
    tile_stride = tl.cast(NUM_PARTS, tl.int64) * num_rows
    exponent = tl.load(exponents_ptr + (num_tiles - 1) * tile_stride, mask=moves, other=0.0)
    scale = LOG2_E / tl.load(temperature_ptr)
    row_scale = -grad_logp / sum_exp * tl.exp2(-tl.fma(row_max, scale, -exponent))
    tl.store(row_scale_ptr + row, tl.where(moves, row_scale, 0.0))
    if moves:
        row_ptr = exponentials_ptr + row.to(tl.int64) * exponentials_row_stride * ALIGNMENT
        columns = tl.arange(0, BLOCK_V)
        num_smaller = 0
        for first in range(0, num_tiles, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES)
            exponents = tl.load(exponents_ptr + tile * tile_stride, mask=tile < num_tiles, other=exponent)
            num_smaller += tl.sum((exponents != exponent).to(tl.int32), axis=0)
        for tile in range(0, num_smaller):
            factor = tl.exp2(tl.load(exponents_ptr + tile * tile_stride) - exponent)
            # a tile before another one is complete
            tile_ptr = row_ptr + tl.cast(tile, tl.int64) * BLOCK_V + columns
            tl.store(tile_ptr, (tl.load(tile_ptr).to(tl.float32) * factor).to(tl.bfloat16))
        tl.debug_barrier()  # another warp may have scaled these columns
        tl.store(row_ptr + chosen_id, tl.full([], 0.0, tl.bfloat16))
        tl.store(row_ptr + other_id, tl.full([], 0.0, tl.bfloat16))


@kernel
def log_grads_kernel(
    exponentials_ptr,  # [n, V] int16: logs in; bfloat16 dL/dlogits out, 0 in two columns
    residual_ptr,  # [n] float32, out: dL/dlogit of the chosen column
    other_grad_ptr,  # [n] float32, out: dL/dlogit of the most probable other column
    other_id_ptr,  # [n] int64, out: that column
    tiles_ptr,  # [num_tiles, NUM_PARTS, n] float32
    chosen_ptr,  # [n] float32
    row_max_ptr,  # [M] as written by `combine_tiles_kernel`
    sum_exp_ptr,  # [M]
    grad_logps_ptr,  # [M] float32
    entropies_ptr,  # [M] float32
    grad_entropies_ptr,  # [M] float32
    order_ptr,
    mask_ptr,
    ids_ptr,
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    exponentials_row_stride,
    vocab_size,
    num_tiles,
    num_columns,  # V rounded up
    ALIGNMENT: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dL/dlogits from dL/dlogps and dL/dentropies, a row per program."""
    row = tl.program_id(0)
    position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
    temperature_ptr = temperature_of(position, temperatures_ptr, hyper_ptr)
    moves, grad_logp, grad_entropy, row_max, sum_exp, entropy, other_id = _row_grad(
        row, keep, position, tiles_ptr, chosen_ptr, residual_ptr, other_grad_ptr, other_id_ptr, row_max_ptr,
        sum_exp_ptr, grad_logps_ptr, entropies_ptr, grad_entropies_ptr, temperature_ptr, hyper_ptr, num_rows,
        vocab_size, num_tiles, False, BLOCK_TILES,
    )  # fmt: skip
    inverse_sum, log_sum_exp = tl.where(moves, 1.0 / sum_exp, 0.0), tl.log(sum_exp)
    scale = LOG2_E / tl.load(temperature_ptr)
    row_ptr = exponentials_ptr + row.to(tl.int64) * exponentials_row_stride * ALIGNMENT
    columns = tl.arange(0, BLOCK_V)
    for tile in range(0, num_tiles):
        top = tl.load(tiles_ptr + (tl.cast(tile, tl.int64) * NUM_PARTS + TOP) * num_rows + row, mask=moves, other=0.0)
        start = tile * BLOCK_V
        in_row = start + columns < num_columns * ALIGNMENT
        readable = start + columns < tl.where(moves, num_columns * ALIGNMENT, 0)
        tile_ptr = row_ptr + tl.cast(start, tl.int64) + columns
        logs = (tl.load(tile_ptr, mask=readable, other=0).to(tl.int32) & 0xFFFF).to(tl.float32)
        powers = tl.where(logs == LARGEST_LOG, float("-inf"), -tl.fma(row_max, scale, -top) - logs * (1.0 / LOG_STEPS))
        probs = tl.exp2(powers) * inverse_sum
        of_entropy = grad_entropy * (powers * LN_2 - log_sum_exp + entropy)
        grads = tl.where(probs == 0, 0.0, -probs * (grad_logp + of_entropy))
        tl.store(tile_ptr, grads.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=in_row)
    tl.debug_barrier()  # another warp may have stored these columns
    tl.store(row_ptr + chosen_id, tl.full([], 0, tl.int16), mask=moves)
    tl.store(row_ptr + other_id, tl.full([], 0, tl.int16), mask=moves)
