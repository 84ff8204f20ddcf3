"""Triton device functions over one row of logits: its log-sum-exp, its chosen logit, and the gradient.

`read_row` reads a row once for its log-sum-exp, in float32 whatever its dtype; `write_grad_logits` reads it again to
write dL/dlogits. Both have the loads of the next columns in flight while they process the present ones, and neither
makes warps wait for each other at every tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton
import triton.language as tl

from expo_kernels._triton.slots import LOGIT_SOFTCAP, TEMPERATURE

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a block of -inf logits gives no NaN


@triton.jit
def temperature_of(position, temperatures_ptr, hyper_ptr):
    """Pointer to the temperature of a row: the number of its position, or the objective's."""
    # a pointer, so that the number occupies no register where it is not used
    return hyper_ptr + TEMPERATURE if temperatures_ptr is None else temperatures_ptr + position


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap), and its derivative."""
    # tanh is -1 in float32 long before the bound, which keeps exp2 finite
    power = tl.minimum(logits * (-2.0 * LOG2_E / softcap), 100.0, propagate_nan=tl.PropagateNan.ALL)
    t = tl.exp2(power)
    inverse = 1.0 / (1.0 + t)
    return softcap * ((1.0 - t) * inverse), 4.0 * (t * inverse) * inverse


@triton.jit
def _widened(tile, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in float32 after the softcap."""
    logits = tile.to(tl.float32)
    if HAS_SOFTCAP:
        logits, _ = capped(logits, softcap)
    return logits


@triton.jit
def _add_tile(
    group_max,
    exp_sums,
    entropy_sums,
    logits,  # [BLOCK_V / WIDTH, WIDTH] float32; -inf outside the row
    scale,
    HAS_ENTROPY: tl.constexpr,
):
    """Add a tile to the running values of each group of columns: maximum, sum of e, sum of e * log2(e)."""
    new_max = tl.maximum(group_max, tl.max(logits, axis=1))
    # the maximum is subtracted before the multiplication: at logits of 1e4 this order avoids an error of 1e-3 nats
    shift = (group_max - new_max) * scale
    powers = (logits - new_max[:, None]) * scale
    shrink = tl.exp2(shift)
    e = tl.exp2(powers)
    if HAS_ENTROPY:
        shifted = entropy_sums + tl.where(exp_sums > 0, shift * exp_sums, 0.0)
        # 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN
        entropy_sums = shrink * shifted + tl.sum(e * tl.maximum(powers, -200.0), axis=1)
    return new_max, exp_sums * shrink + tl.sum(e, axis=1), entropy_sums


@triton.jit
def read_row(
    row_ptr,
    keep,  # scalar bool: if False, nothing is read
    vocab_size,
    temperature_ptr,
    hyper_ptr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WIDE_ROWS: tl.constexpr,  # V is a multiple of 16
    BLOCK_V: tl.constexpr,
):
    """Maximum of a row, sum of e = exp((logit - maximum) / temperature), and sum of e * log2(e) for the entropy.

    Every thread keeps running values of its own columns, so that warps wait for each other once per row and not once
    per tile. Two tiles take turns: while one is processed, the loads of the other are in flight.
    """
    WIDTH: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth  # columns of a 128-bit load
    scale = LOG2_E / tl.load(temperature_ptr)
    softcap = tl.load(hyper_ptr + LOGIT_SOFTCAP)
    group_max = tl.full([BLOCK_V // WIDTH], LOWEST, tl.float32)
    exp_sums = tl.zeros([BLOCK_V // WIDTH], tl.float32)
    entropy_sums = tl.zeros([BLOCK_V // WIDTH], tl.float32)
    groups, members = tl.arange(0, BLOCK_V // WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    # a group is what one thread loads: adjacent columns, unless rows of this length allow no wide loads
    columns = groups * WIDTH + members if HAS_WIDE_ROWS else groups + members * (BLOCK_V // WIDTH)
    readable = tl.where(keep, vocab_size, 0)
    paired = readable // (2 * BLOCK_V) * (2 * BLOCK_V)
    even = tl.load(row_ptr + columns, mask=columns < paired)
    odd = tl.load(row_ptr + BLOCK_V + columns, mask=columns < paired)
    for start in range(paired, readable, BLOCK_V):  # the tiles behind the last pair
        in_range = start + columns < readable
        logits = _widened(tl.load(row_ptr + start + columns, mask=in_range, other=0.0), softcap, HAS_SOFTCAP)
        logits = tl.where(in_range, logits, float("-inf"))
        group_max, exp_sums, entropy_sums = _add_tile(group_max, exp_sums, entropy_sums, logits, scale, HAS_ENTROPY)
    for start in range(0, paired, 2 * BLOCK_V):
        following = start + 2 * BLOCK_V + columns
        logits = _widened(even, softcap, HAS_SOFTCAP)
        group_max, exp_sums, entropy_sums = _add_tile(group_max, exp_sums, entropy_sums, logits, scale, HAS_ENTROPY)
        even = tl.load(row_ptr + following, mask=following < paired)
        logits = _widened(odd, softcap, HAS_SOFTCAP)
        group_max, exp_sums, entropy_sums = _add_tile(group_max, exp_sums, entropy_sums, logits, scale, HAS_ENTROPY)
        odd = tl.load(row_ptr + following + BLOCK_V, mask=following < paired)
    row_max = tl.max(group_max, axis=0)
    shift = (group_max - row_max) * scale
    shrink = tl.exp2(shift)
    if HAS_ENTROPY:
        entropy_sums = shrink * (entropy_sums + tl.where(exp_sums > 0, shift * exp_sums, 0.0))
    return row_max, tl.sum(shrink * exp_sums, axis=0), tl.sum(entropy_sums, axis=0)


@triton.jit
def chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP: tl.constexpr):
    """Logit of the chosen token after the softcap, and the softcap's derivative."""
    # the id is -1 if another rank holds the column
    logit = tl.load(row_ptr + chosen_id, mask=keep & (chosen_id >= 0), other=0.0).to(tl.float32)
    cap_grad = 1.0
    if HAS_SOFTCAP:
        logit, cap_grad = capped(logit, tl.load(hyper_ptr + LOGIT_SOFTCAP))
    return logit, cap_grad


@triton.jit
def _grad_of_tile(
    tile,
    of_probs,  # dL/dlogit = of_probs * e, without entropies
    inverse_sum,
    row_max,
    grad_entropy,
    entropy_less_lse,
    scale,
    temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dL/dlogits of a tile, except for the chosen column."""
    logits = tile.to(tl.float32)
    if HAS_SOFTCAP:
        logits, cap_grads = capped(logits, softcap)
    e = tl.exp2((logits - row_max) * scale)
    grads = of_probs * e
    if HAS_ENTROPY:
        probs = e * inverse_sum
        of_entropy = probs * ((logits - row_max) / temperature + entropy_less_lse)
        grads -= grad_entropy * tl.where(probs == 0, 0.0, of_entropy)
    if HAS_SOFTCAP:
        grads *= cap_grads
    return grads


@triton.jit
def write_grad_logits(
    grad_row_ptr,
    row_ptr,
    chosen_id,
    grad_logp,  # scalar dL/dlogp
    grad_entropy,  # scalar dL/dentropy, read with HAS_ENTROPY only
    entropy,
    row_max,
    sum_exp,  # sum of exp((logit - row_max) / temperature)
    keep,
    vocab_size,
    temperature_ptr,
    hyper_ptr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,  # the gradient overwrites the logits, or the front of each row
    BLOCK_V: tl.constexpr,
    grad_lse=0.0,  # scalar dL/dlse, read with HAS_LSE only
    HAS_LSE: tl.constexpr = False,
):
    """Write dL/dlogits of a row; return the rounding error of the chosen column.

    dlogp / dlogit_j = ([j is chosen] - p_j) / temperature
    dentropy / dlogit_j = -p_j (log p_j + entropy) / temperature
    dlse / dlogit_j = p_j / temperature
    """
    grad_type: tl.constexpr = grad_row_ptr.dtype.element_ty
    IS_NARROWER: tl.constexpr = grad_type.primitive_bitwidth < row_ptr.dtype.element_ty.primitive_bitwidth
    temperature = tl.load(temperature_ptr)
    scale = LOG2_E / temperature
    softcap = tl.load(hyper_ptr + LOGIT_SOFTCAP)
    moves = grad_logp != 0
    if HAS_ENTROPY:
        moves = moves | (grad_entropy != 0)
    if HAS_LSE:
        moves = moves | (grad_lse != 0)
    moves = keep & moves
    # a row that is skipped, or whose gradient is 0, is not read; its gradient is set to 0
    grad_logp = tl.where(moves, grad_logp, 0.0) / temperature
    inverse_sum = tl.where(moves, 1.0 / sum_exp, 0.0)
    row_max = tl.where(moves, row_max, 0.0)
    of_probs = -grad_logp * inverse_sum
    if HAS_LSE:
        grad_lse = tl.where(moves, grad_lse, 0.0) / temperature
        of_probs = (grad_lse - grad_logp) * inverse_sum
    log_sum_exp = tl.log(tl.where(moves, sum_exp, 1.0))
    if HAS_ENTROPY:
        grad_entropy = tl.where(moves, grad_entropy, 0.0) / temperature
    chosen, chosen_cap_grad = chosen_logit(row_ptr, chosen_id, moves, hyper_ptr, HAS_SOFTCAP)
    chosen_prob = tl.exp2((chosen - row_max) * scale) * inverse_sum
    chosen_grad = grad_logp * (1.0 - chosen_prob)
    if HAS_LSE:
        chosen_grad += grad_lse * chosen_prob
    if HAS_ENTROPY:
        chosen_logp = (chosen - row_max) / temperature - log_sum_exp
        chosen_grad -= grad_entropy * tl.where(chosen_prob == 0, 0.0, chosen_prob * (chosen_logp + entropy))
    chosen_grad = tl.where(moves, chosen_grad * chosen_cap_grad, 0.0)
    columns = tl.arange(0, BLOCK_V)
    if GRAD_SHARES_MEMORY:
        # every warp reads the chosen logit; no warp may overwrite it before all have read it
        tl.debug_barrier()
    if moves:
        even = tl.load(row_ptr + columns, mask=columns < vocab_size)
        odd = tl.load(row_ptr + BLOCK_V + columns, mask=BLOCK_V + columns < vocab_size)
        next_barrier = 0
        for start in range(0, vocab_size, 2 * BLOCK_V):
            for parity in tl.static_range(2):
                tile = even if parity == 0 else odd
                at = start + parity * BLOCK_V
                grads = _grad_of_tile(
                    tile, of_probs, inverse_sum, row_max, grad_entropy, entropy - log_sum_exp, scale, temperature,
                    softcap, HAS_SOFTCAP, HAS_ENTROPY,
                )  # fmt: skip
                if GRAD_SHARES_MEMORY and IS_NARROWER:  # noqa: SIM102 - the first is known to the compiler
                    # Gradients of half the width overwrite the front of the same row: those of tile k overwrite logits
                    # of tile k / 2. After a barrier at tile j all warps have read tile j + 1, so that the next one is
                    # due at tile 2 j + 4.
                    if at == next_barrier:
                        tl.debug_barrier()
                        next_barrier = 2 * at + 4 * BLOCK_V
                tl.store(grad_row_ptr + at + columns, grads.to(grad_type), mask=at + columns < vocab_size)
                following = at + 2 * BLOCK_V + columns
                tile = tl.load(row_ptr + following, mask=following < vocab_size)
                if parity == 0:
                    even = tile
                else:
                    odd = tile
        tl.debug_barrier()  # another warp may have stored the chosen column
        tl.store(grad_row_ptr + chosen_id, chosen_grad.to(grad_type), mask=chosen_id >= 0)
    else:
        zeros = tl.zeros([BLOCK_V], grad_type)
        for start in range(0, vocab_size, BLOCK_V):
            tl.store(grad_row_ptr + start + columns, zeros, mask=start + columns < vocab_size)
    return chosen_grad - chosen_grad.to(grad_type).to(tl.float32)


@triton.jit
def locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size, IS_SHARD: tl.constexpr = False):
    """Position of a row, its chosen id, and whether the row is valid.

    IS_SHARD: other ranks hold the columns outside [0, V), so a row with such an id is valid; the id returned is -1.
    """
    position = (first_row + row).to(tl.int64)
    if order_ptr is not None:
        position = tl.load(order_ptr + position)
    keep = position >= 0
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + position) != 0
    chosen_id = tl.load(ids_ptr + position, mask=keep, other=-1).to(tl.int64)
    is_here = (chosen_id >= 0) & (chosen_id < vocab_size)
    if IS_SHARD:
        chosen_id = tl.where(is_here, chosen_id, -1)
    else:
        keep = keep & is_here
    return position, chosen_id, keep


@triton.jit
def row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT: tl.constexpr):
    """Offset of a row in elements. Strides are in units of ALIGNMENT, so that the compiler knows the alignment."""
    batch = (row // rows_per_batch).to(tl.int64)
    within = (row % rows_per_batch).to(tl.int64)
    return (batch * batch_stride + within * row_stride) * ALIGNMENT
