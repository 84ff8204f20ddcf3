"""Triton kernels of a head that keeps bfloat16 exponentials of its logits: the pass over the logits.

`exponentials_kernel` reads float32 logits of one tile of the vocabulary and writes 2^(z - k), where z = logit * log2(e)
/ temperature and k is one integer per row and tile. `combine_tiles_kernel` adds the sums of a row's tiles in order.
`exponential_grads.py` has the gradients.

k is the one of the tile before, unless a logit of the tile exceeds it by `MARGIN`. Nearly all rows then have the same k
in all tiles, so that the gradient needs no pass over the exponentials.

With gradients of entropies a factor per row does not suffice. Tiles then hold log2 of the exponentials as 16-bit fixed
point numbers.

Letters: n rows of one launch, V vocabulary, M positions of the caller's tensors. Rows as in `rows.py`, tiles of BLOCK_V
columns.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton.language as tl

from expo_kernels._triton.device import kernel
from expo_kernels._triton.row import LOG2_E, LOWEST, capped, locate, temperature_of
from expo_kernels._triton.shards import locate_rows, temperatures_at
from expo_kernels._triton.slots import LOGIT_SOFTCAP

LN_2 = tl.constexpr(0.6931471805599453)
# of z over k. 2^64 times V columns times their weights stays far below the largest float32 and bfloat16, 2^128; and the
# largest exponential of a row is at least 1/2, so that what is lost below 2^-126 is nothing
MARGIN = tl.constexpr(64.0)

# the numbers of each (tile, row), in this order; the last two only if entropies or logs are wanted
EXPONENT = tl.constexpr(0)  # k
SUM_EXP = tl.constexpr(1)  # sum of 2^(z - k) before it is rounded to bfloat16
OTHER = tl.constexpr(2)  # the largest logit but for the chosen one, before the softcap
OTHER_ID = tl.constexpr(3)  # its column, an int32
ENTROPY_SUM = tl.constexpr(4)  # sum of 2^(z - k) * (z - k)
TOP = tl.constexpr(5)  # an integer, at least the largest z of the tile
NUM_PARTS = tl.constexpr(6)

# logs: (TOP - z) * LOG_STEPS, rounded, in 16 bits without a sign; the largest stands for all below, 2^-64 and less
LOG_STEPS = tl.constexpr(1024.0)
LARGEST_LOG = tl.constexpr(65535.0)
# a float32 of this size counts in steps of 1, so that adding it rounds to an integer, which its lower bits hold
INTEGERS = tl.constexpr(8388608.0)


@kernel
def exponentials_kernel(
    logits_ptr,  # [n, BLOCK_V] float32: hidden states times the tile's rows of the weight
    exponentials_ptr,  # [n, V] bfloat16, or int16 with STORES_LOGS; None: only sums are wanted
    tiles_ptr,  # [num_tiles, NUM_PARTS, n] float32: reads the numbers of the tile before, writes those of this one
    chosen_ptr,  # [n] float32, out: the chosen logit of rows whose id is in this tile, before the softcap
    bias_ptr,  # [V] or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    ids_ptr,  # [M] integers
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    row_stride,
    exponentials_row_stride,
    vocab_size,
    tile,
    num_columns,  # of this tile, rounded up: the columns behind the vocabulary are set to 0
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    STORES_LOGS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # strides and num_columns are in units of it
    BLOCK_V: tl.constexpr,
):
    """Exponentials of one tile of the vocabulary, a row per program, and their sums in float32."""
    row = tl.program_id(0)
    position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride * ALIGNMENT
    columns = tl.arange(0, BLOCK_V)
    start = tl.cast(tile, tl.int64) * BLOCK_V
    in_row = columns < num_columns * ALIGNMENT
    logits = tl.load(row_ptr + columns, mask=columns < tl.where(keep, num_columns * ALIGNMENT, 0), other=0.0)
    # comparisons of 64-bit integers would take two instructions each
    is_valid = columns < tl.where(keep, vocab_size - start, 0).to(tl.int32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + start + columns, mask=is_valid, other=0.0).to(tl.float32)
    logits = tl.where(is_valid, logits, float("-inf"))
    chosen_column = (tl.where(keep, chosen_id, -1) - start).to(tl.int32)
    is_here = (chosen_column >= 0) & (chosen_column < BLOCK_V)
    chosen = tl.load(row_ptr + chosen_column, mask=is_here, other=0.0)
    if bias_ptr is not None:
        chosen += tl.load(bias_ptr + chosen_id, mask=is_here, other=0.0).to(tl.float32)
    tl.store(chosen_ptr + row, chosen, mask=is_here)
    other, other_column = tl.max(tl.where(columns == chosen_column, float("-inf"), logits), axis=0, return_indices=True)
    largest = tl.maximum(other, tl.where(is_here, chosen, float("-inf")))
    cap_grads = 1.0
    if HAS_SOFTCAP:
        softcap = tl.load(hyper_ptr + LOGIT_SOFTCAP)
        logits, cap_grads = capped(logits, softcap)
        logits = tl.where(is_valid, logits, float("-inf"))
        largest, _ = capped(largest, softcap)
    scale = LOG2_E / tl.load(temperature_of(position, temperatures_ptr, hyper_ptr))
    top = tl.maximum(tl.ceil(largest * scale), LOWEST)
    part_ptr = tiles_ptr + tl.cast(tile, tl.int64) * NUM_PARTS * num_rows + row
    before = tl.load(part_ptr - NUM_PARTS * num_rows + EXPONENT * num_rows, mask=tile > 0, other=LOWEST)
    exponent = tl.where(top > before + MARGIN, top, before)
    # rounded once: at logits of 1e4 the rounding of a product before the difference would cost 1e-3 nats
    powers = tl.fma(logits, scale, -exponent)
    e = tl.exp2(powers)
    tl.store(part_ptr + EXPONENT * num_rows, exponent)
    tl.store(part_ptr + SUM_EXP * num_rows, tl.sum(e, axis=0))
    tl.store(part_ptr + OTHER * num_rows, other)
    tl.store(part_ptr + OTHER_ID * num_rows, (start + other_column).to(tl.int32).to(tl.float32, bitcast=True))
    if HAS_ENTROPY:
        # 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN
        tl.store(part_ptr + ENTROPY_SUM * num_rows, tl.sum(e * tl.maximum(powers, -200.0), axis=0))
    if exponentials_ptr is not None:
        out_ptr = exponentials_ptr + row.to(tl.int64) * exponentials_row_stride * ALIGNMENT + start + columns
        if STORES_LOGS:
            tl.store(part_ptr + TOP * num_rows, top)
            logs = tl.minimum(((top - exponent) - powers) * LOG_STEPS, LARGEST_LOG)
            bits = (logs + INTEGERS).to(tl.int32, bitcast=True)
            tl.store(out_ptr, bits.to(tl.int16), mask=in_row)
        else:
            tl.store(out_ptr, (e * cap_grads).to(tl.bfloat16), mask=in_row)


@kernel
def combine_tiles_kernel(
    tiles_ptr,  # [num_tiles, NUM_PARTS, n] float32
    chosen_ptr,  # [n] float32
    logps_ptr,  # [M] float32, out
    entropies_ptr,  # [M] float32, out, or None
    row_max_ptr,  # [M] float32, out, or None: a number near the maximum of each row
    sum_exp_ptr,  # [M] float32, out: sum of exp((logit - that number) / temperature), or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    num_tiles,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Log-probs of the chosen tokens, and, if wanted, entropies and the row values that the gradient needs."""
    HAS_ENTROPY: tl.constexpr = entropies_ptr is not None
    start = tl.program_id(0) * BLOCK_N
    row, position, in_range, keep = locate_rows(start, first_row, num_rows, order_ptr, mask_ptr, BLOCK_N)
    scale = LOG2_E / temperatures_at(position, in_range, temperatures_ptr, hyper_ptr)
    # k never decreases from one tile to the next
    last_ptr = tiles_ptr + tl.cast(num_tiles - 1, tl.int64) * NUM_PARTS * num_rows + row
    exponent = tl.load(last_ptr + EXPONENT * num_rows, mask=keep, other=0.0)
    sum_exp = tl.zeros([BLOCK_N], tl.float32)
    entropy_sum = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, num_tiles):
        part_ptr = tiles_ptr + tl.cast(tile, tl.int64) * NUM_PARTS * num_rows + row
        shift = tl.load(part_ptr + EXPONENT * num_rows, mask=keep, other=0.0) - exponent
        shrink = tl.exp2(shift)
        some_exp = tl.load(part_ptr + SUM_EXP * num_rows, mask=keep, other=0.0)
        sum_exp += shrink * some_exp
        if HAS_ENTROPY:
            some_entropy = tl.load(part_ptr + ENTROPY_SUM * num_rows, mask=keep, other=0.0)
            entropy_sum += shrink * (some_entropy + tl.where(some_exp > 0, shift * some_exp, 0.0))
    # sum = 2^power * fraction with 1 <= fraction < 2, so that the digits of a log-prob do not depend on k
    sum_exp = tl.where(keep, sum_exp, 1.0)
    bits = sum_exp.to(tl.int32, bitcast=True)
    power = ((bits >> 23) - 127).to(tl.float32)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent += power
    log_fraction = tl.log(fraction)
    chosen = tl.load(chosen_ptr + row, mask=keep, other=0.0)
    if HAS_SOFTCAP:
        chosen, _ = capped(chosen, tl.load(hyper_ptr + LOGIT_SOFTCAP))
    logp = tl.fma(chosen, scale, -exponent) * LN_2 - log_fraction
    tl.store(logps_ptr + position, tl.where(keep, logp, 0.0), mask=in_range)
    if HAS_ENTROPY:
        entropy_sum = tl.exp2(-power) * entropy_sum - power * fraction
        entropy = log_fraction - entropy_sum * LN_2 / fraction
        tl.store(entropies_ptr + position, tl.where(keep, entropy, 0.0), mask=in_range)
    if row_max_ptr is not None:
        # the exponent in units of a logit, rounded, and the sum for the rounded one
        row_max = exponent / scale
        tl.store(row_max_ptr + position, row_max, mask=in_range)
        tl.store(sum_exp_ptr + position, fraction * tl.exp2(-tl.fma(row_max, scale, -exponent)), mask=in_range)
