"""Triton device functions that the row kernels are made of: one row of logits, one token's objective, one sum.

Source: the formulas are those of `reference.py` (FG-ExPO, arXiv 2605.11403, eq. 1 to 3). A row is read once for its
log-sum-exp, in float32 whatever its dtype, and once more to write dL/dlogits; both loops stand here once, as `read_row`
and `write_slopes`. Gradients are written beside the formulas: the interpreter's tests hold them to float64 autograd.

Letters: n rows of one launch, V vocabulary, G rollouts per question.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: its arguments are what Triton makes of pointers and numbers

import triton
import triton.language as tl

# where each number stands in the float32 block of hyper-parameters; see `hyper_parameters`
TEMPERATURE = tl.constexpr(0)
SOFTCAP = tl.constexpr(1)
RATIO_LOW = tl.constexpr(2)
RATIO_HIGH = tl.constexpr(3)
DUAL_CLIP = tl.constexpr(4)
LOG_RATIO_CLAMP = tl.constexpr(5)
TAU_POS = tl.constexpr(6)
TAU_NEG = tl.constexpr(7)
ROLLOUT_CAP = tl.constexpr(8)
REWARD_EPS = tl.constexpr(9)
LENGTH = tl.constexpr(10)
ROLLOUT_FLOOR = tl.constexpr(11)
ROLLOUT_KEPT = tl.constexpr(12)
K_POS = tl.constexpr(13)
K_NEG = tl.constexpr(14)
DECAY_POS = tl.constexpr(15)
DECAY_NEG = tl.constexpr(16)

# what the programs sum up: loss, kl, ratio, largest ratio, clipped low, clipped high, tokens, entropy
NUM_SUMS = tl.constexpr(8)
AT_LOSS = tl.constexpr(0)
AT_RATIO_MAX = tl.constexpr(3)
AT_TOKENS = tl.constexpr(6)

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a block of -inf logits leaves no NaN behind
BLOCK_G = tl.constexpr(64)  # rewards read at once; larger groups take more turns
BLOCK_P = tl.constexpr(32)  # programs whose sums are added at once


# --- one row of logits


@triton.jit
def _capped(logits, softcap):
    """softcap * tanh(logits / softcap), and its derivative."""
    t = tl.exp(-2.0 * tl.abs(logits) / softcap)
    tanh = (1.0 - t) / (1.0 + t)
    return softcap * tl.where(logits < 0, -tanh, tanh), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def read_row(
    row_ptr,
    keep,  # scalar bool: False reads nothing
    vocab_size,
    hyper_ptr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Largest logit, sum of e = exp((logit - largest) / temperature), and sum of e * log2(e) for the entropy."""
    scale = LOG2_E / tl.load(hyper_ptr + TEMPERATURE)
    softcap = tl.load(hyper_ptr + SOFTCAP)
    top = tl.full([], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    moments = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, tl.where(keep, vocab_size, 0), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_range = columns < vocab_size
        logits = tl.load(row_ptr + columns, mask=in_range, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            capped, _ = _capped(logits, softcap)
            logits = tl.where(in_range, capped, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=0))
        # the largest is taken off before anything is multiplied: at logits of 1e4 that order saves 1e-3 nats
        shift = (top - new_top) * scale
        powers = (logits - new_top) * scale
        shrink = tl.exp2(shift)
        e = tl.exp2(powers)
        if HAS_ENTROPY:
            moved = moments + tl.where(sums > 0, shift * sums, 0.0)
            moments = shrink * moved + tl.where(e == 0, 0.0, e * powers)
        sums = sums * shrink + e
        top = new_top
    return top, tl.sum(sums, axis=0), tl.sum(moments, axis=0)


@triton.jit
def chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP: tl.constexpr):
    """Logit of the chosen token after the cap, and the cap's derivative there."""
    logit = tl.load(row_ptr + chosen_id, mask=keep, other=0.0).to(tl.float32)
    cap_slope = 1.0
    if HAS_SOFTCAP:
        logit, cap_slope = _capped(logit, tl.load(hyper_ptr + SOFTCAP))
    return logit, cap_slope


@triton.jit
def write_slopes(
    grad_row_ptr,
    row_ptr,
    chosen_id,
    logp_slope,  # scalar dL/dlogp
    entropy_slope,  # scalar dL/dentropy, read with HAS_ENTROPY only
    entropy,
    top,
    total,  # sum of exp((logit - top) / temperature)
    keep,
    vocab_size,
    hyper_ptr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,  # with the logits: it goes over them, or over the front of them
    BLOCK_V: tl.constexpr,
):
    """Write dL/dlogits of a row; return what rounding took from the chosen column.

    dlogp / dlogit_j = ([j is chosen] - p_j) / temperature
    dentropy / dlogit_j = -p_j (log p_j + entropy) / temperature
    """
    temperature = tl.load(hyper_ptr + TEMPERATURE)
    scale = LOG2_E / temperature
    softcap = tl.load(hyper_ptr + SOFTCAP)
    moves = logp_slope != 0
    if HAS_ENTROPY:
        moves = moves | (entropy_slope != 0)
    moves = keep & moves
    # a row that is skipped, or whose slope is 0, is not read: it is only set to 0
    logp_slope = tl.where(moves, logp_slope, 0.0) / temperature
    inverse_total = tl.where(moves, 1.0 / total, 0.0)
    top = tl.where(moves, top, 0.0)
    of_probs = -logp_slope * inverse_total
    log_total = tl.log(tl.where(moves, total, 1.0))
    if HAS_ENTROPY:
        entropy_slope = tl.where(moves, entropy_slope, 0.0) / temperature
    chosen, chosen_cap_slope = chosen_logit(row_ptr, chosen_id, moves, hyper_ptr, HAS_SOFTCAP)
    chosen_prob = tl.exp2((chosen - top) * scale) * inverse_total
    chosen_slope = logp_slope * (1.0 - chosen_prob)
    if HAS_ENTROPY:
        chosen_logp = (chosen - top) / temperature - log_total
        chosen_slope -= entropy_slope * tl.where(chosen_prob == 0, 0.0, chosen_prob * (chosen_logp + entropy))
    chosen_slope = tl.where(moves, chosen_slope * chosen_cap_slope, 0.0)
    readable = tl.where(moves, vocab_size, 0)
    if GRAD_SHARES_MEMORY:
        # every warp reads the chosen logit: none may overwrite it before all have
        tl.debug_barrier()
    for start in range(0, vocab_size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_range = columns < vocab_size
        logits = tl.load(row_ptr + columns, mask=columns < readable, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            logits, cap_slopes = _capped(logits, softcap)
        e = tl.exp2((logits - top) * scale)
        slopes = of_probs * e
        if HAS_ENTROPY:
            probs = e * inverse_total
            of_entropy = probs * ((logits - top) / temperature - log_total + entropy)
            slopes -= entropy_slope * tl.where(probs == 0, 0.0, of_entropy)
        if HAS_SOFTCAP:
            slopes *= cap_slopes
        slopes = tl.where(columns == chosen_id, chosen_slope, slopes)
        if GRAD_SHARES_MEMORY and grad_row_ptr.dtype.element_ty != row_ptr.dtype.element_ty:
            # narrower gradients go over the front of the same row: in rising order they never reach a block that is
            # still to be read, but no warp may write before all have read this one
            tl.debug_barrier()
        tl.store(grad_row_ptr + columns, slopes.to(grad_row_ptr.dtype.element_ty), mask=in_range)
    return chosen_slope - chosen_slope.to(grad_row_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size):
    """Position of a row, the id chosen there, and whether it counts."""
    position = (first_row + row).to(tl.int64)
    if order_ptr is not None:
        position = tl.load(order_ptr + position)
    keep = position >= 0
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + position) != 0
    chosen_id = tl.load(ids_ptr + position, mask=keep, other=-1).to(tl.int64)
    return position, chosen_id, keep & (chosen_id >= 0) & (chosen_id < vocab_size)


@triton.jit
def row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT: tl.constexpr):
    """Elements from the tensor's start to the row's. Strides come in units of ALIGNMENT, so that it is known."""
    batch = (row // rows_per_batch).to(tl.int64)
    within = (row % rows_per_batch).to(tl.int64)
    return (batch * batch_stride + within * row_stride) * ALIGNMENT


# --- what the objective says of a token: a scalar or a block of them


@triton.jit
def _clamp(values, bound):
    low = tl.maximum(values, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _surrogate(log_ratio, logp, advantage, hyper_ptr, SURROGATE: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr):
    """Eq. 2, negated: loss, dloss/dlog_ratio, dloss/dlogp beside it, ratio, and which clipped term was chosen."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    ratio = tl.exp(_clamp(log_ratio, bound))
    # a clamped log-ratio has no slope
    ratio_slope = tl.where(tl.abs(log_ratio) <= bound, ratio, 0.0)
    low = ratio < tl.load(hyper_ptr + RATIO_LOW)
    high = ratio > tl.load(hyper_ptr + RATIO_HIGH)
    clipped = tl.where(low, tl.load(hyper_ptr + RATIO_LOW), tl.where(high, tl.load(hyper_ptr + RATIO_HIGH), ratio))
    logp_slope = 0.0 * ratio
    if SURROGATE == "sapo":
        tau = tl.where(advantage > 0, tl.load(hyper_ptr + TAU_POS), tl.load(hyper_ptr + TAU_NEG))
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 * gate * advantage / tau
        ratio_slope *= -4.0 * gate * (1.0 - gate) * advantage
        low = low & False
        high = high & False
    elif SURROGATE == "cispo":
        logp_slope = -clipped * advantage
        loss = logp_slope * logp
        ratio_slope = 0.0 * ratio
    elif SURROGATE == "vespo":
        # the sequence's weight comes with the rollout's
        logp_slope = -advantage + 0.0 * logp
        loss = logp_slope * logp
        ratio_slope = 0.0 * ratio
        low = low & False
        high = high & False
    elif SURROGATE == "gmpo":
        # the mean over the sequence's clipped log-ratios is what the ratio is made of
        loss = -ratio * advantage
        ratio_slope = -advantage * ratio_slope
        low = low & False
        high = high & False
    else:
        loss = -tl.minimum(ratio * advantage, clipped * advantage, propagate_nan=tl.PropagateNan.ALL)
        is_clipped = (low & (advantage < 0)) | (high & (advantage > 0))
        ratio_slope = tl.where(is_clipped, 0.0, -advantage * ratio_slope)
        if HAS_DUAL_CLIP:
            cap = -tl.load(hyper_ptr + DUAL_CLIP) * advantage
            is_capped = (advantage < 0) & (cap < loss)
            loss = tl.where(is_capped, cap, loss)
            ratio_slope = tl.where(is_capped, 0.0, ratio_slope)
            high = (high & (advantage > 0)) | is_capped
        else:
            high = high & (advantage > 0)
        low = low & (advantage < 0)
    return loss, ratio_slope, logp_slope, ratio, low, high


@triton.jit
def _penalty(logp, ref_logp, hyper_ptr, KL: tl.constexpr):
    """Eq. 3 or its kin: penalty in nats, and dpenalty/dlogp."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    difference = ref_logp - logp
    x = _clamp(difference, bound)
    if KL == "k1":
        penalty = -x
        slope = 1.0 + 0.0 * x
    elif KL == "k2":
        penalty = 0.5 * x * x
        slope = -x
    else:
        # near 0, exp(x) - x - 1 as a series: the difference would keep no digits
        series = 1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880))
        series = 1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series)))
        penalty = tl.where(tl.abs(x) < 0.5, x * x * (0.5 + x * series), tl.exp(x) - x - 1.0)
        slope = -(penalty + x)
    return penalty, tl.where(tl.abs(difference) <= bound, slope, 0.0)


@triton.jit
def token_objective(
    logp,
    old_logp,
    log_ratio,  # of the token or of its sequence
    advantage,
    rollout_weight,
    position,
    keep,
    ref_logps_ptr,
    beta,
    hyper_ptr,
    SURROGATE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
):
    """Loss of a token, dloss/dlog_ratio, dloss/dlogp beside it, penalty, ratio, clipped low, clipped high."""
    loss, ratio_slope, logp_slope, ratio, low, high = _surrogate(
        log_ratio, logp, advantage, hyper_ptr, SURROGATE, HAS_DUAL_CLIP
    )
    loss *= rollout_weight
    ratio_slope *= rollout_weight
    logp_slope *= rollout_weight
    penalty = 0.0 * logp
    if ref_logps_ptr is not None:
        ref_logp = tl.load(ref_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
        penalty, penalty_slope = _penalty(logp, ref_logp, hyper_ptr, KL)
        if KL_WEIGHTED:
            bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
            difference = logp - old_logp
            weight = tl.exp(_clamp(difference, bound))
            penalty = penalty * weight
            penalty_slope = penalty_slope * weight + tl.where(tl.abs(difference) <= bound, penalty, 0.0)
        loss += beta * penalty
        logp_slope += beta * penalty_slope
    return loss, ratio_slope, logp_slope, penalty, ratio, low, high


@triton.jit
def group_advantage(rewards_ptr, sequence, group_size, hyper_ptr):
    """Eq. 1: one reward against the others of its question; population std; exactly 0 in a constant group."""
    first = (sequence // group_size).to(tl.int64) * group_size
    own = tl.load(rewards_ptr + sequence).to(tl.float32)
    # against the group's first reward, whose offset cancels: means of equal or nearly equal rewards keep their digits
    origin = tl.load(rewards_ptr + first).to(tl.float32)
    total = 0.0
    differs = 0
    for start in range(0, group_size, BLOCK_G):
        member = start + tl.arange(0, BLOCK_G)
        rewards = tl.load(rewards_ptr + first + member, mask=member < group_size, other=0.0).to(tl.float32)
        offsets = tl.where(member < group_size, rewards - origin, 0.0)
        total += tl.sum(offsets, axis=0)
        differs += tl.sum((offsets != 0).to(tl.int32), axis=0)
    mean = total / group_size
    squares = 0.0
    for start in range(0, group_size, BLOCK_G):
        member = start + tl.arange(0, BLOCK_G)
        rewards = tl.load(rewards_ptr + first + member, mask=member < group_size, other=0.0).to(tl.float32)
        centred = tl.where(member < group_size, rewards - origin - mean, 0.0)
        squares += tl.sum(centred * centred, axis=0)
    std = tl.sqrt(squares / group_size)
    advantage = (own - origin - mean) / (std + tl.load(hyper_ptr + REWARD_EPS))
    return tl.where(differs == 0, 0.0, advantage)


@triton.jit
def token_advantages(advantages_ptr, position, keep, sequence_advantage, ADVANTAGES: tl.constexpr):
    """Advantages at a block of positions of one sequence."""
    if ADVANTAGES == "token":
        return tl.load(advantages_ptr + position, mask=keep, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - a branch that is not taken must not be compiled
        return tl.where(keep, sequence_advantage, 0.0)


@triton.jit
def rollout_weight_of(difference, hyper_ptr):
    """exp(difference) within [floor, cap]: how much the surrogate of a token counts, given what its sampler reported.

    Out of bounds it is the bound, times 0 where the correction masks.
    """
    weight = tl.exp(_clamp(difference, tl.load(hyper_ptr + LOG_RATIO_CLAMP)))
    floor = tl.load(hyper_ptr + ROLLOUT_FLOOR)
    cap = tl.load(hyper_ptr + ROLLOUT_CAP)
    kept = tl.load(hyper_ptr + ROLLOUT_KEPT)
    return tl.where(weight > cap, cap * kept, tl.where(weight < floor, floor * kept, weight))


@triton.jit
def clipped_log_ratio(difference, advantage, hyper_ptr):
    """GMPO: the log-ratio as it enters the sequence's mean, its slope there (1 or 0), clipped low, clipped high."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    lowest = tl.log(tl.load(hyper_ptr + RATIO_LOW))
    highest = tl.log(tl.load(hyper_ptr + RATIO_HIGH))
    x = _clamp(difference, bound)
    low = (x < lowest) & (advantage < 0)
    high = (x > highest) & (advantage > 0)
    slope = tl.where(low | high, 0.0, tl.where(tl.abs(difference) <= bound, 1.0, 0.0))
    return tl.where(low, lowest, tl.where(high, highest, x)), slope, low, high


@triton.jit
def whole_log_ratio(difference, rollout_weight, hyper_ptr):
    """VESPO: what a token adds to the log of its sequence's ratio, rollout correction included."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    is_kept = rollout_weight != 0
    correction = tl.where(is_kept, tl.log(tl.where(is_kept, rollout_weight, 1.0)), -bound)
    return _clamp(difference, bound) + _clamp(correction, bound)


@triton.jit
def gamma_weight(log_ratio, advantage, hyper_ptr):
    """VESPO: w^k exp(decay (1 - w)) of a sequence's ratio w, by the sign of the advantage."""
    log_ratio = _clamp(log_ratio, tl.load(hyper_ptr + LOG_RATIO_CLAMP))
    is_gain = advantage >= 0
    k = tl.where(is_gain, tl.load(hyper_ptr + K_POS), tl.load(hyper_ptr + K_NEG))
    decay = tl.where(is_gain, tl.load(hyper_ptr + DECAY_POS), tl.load(hyper_ptr + DECAY_NEG))
    return tl.exp(decay + k * log_ratio - decay * tl.exp(log_ratio))


# --- sums over programs


@triton.jit
def publish(
    partials_ptr,  # [num_programs, NUM_SUMS] float64
    counter_ptr,  # [1] int32, 0 before and after
    totals_ptr,  # [NUM_SUMS] float64, the launches so far
    metrics_ptr,  # [NUM_SUMS] float32, what they come to
    loss,
    kl,
    ratio,
    ratio_max,
    low,
    high,
    tokens,
    entropy,
):
    """Write this program's sums; the last program to arrive adds all of them to the totals, always in one order."""
    mine_ptr = partials_ptr + tl.program_id(0) * NUM_SUMS
    tl.store(mine_ptr, loss)
    tl.store(mine_ptr + 1, kl)
    tl.store(mine_ptr + 2, ratio)
    tl.store(mine_ptr + 3, ratio_max)
    tl.store(mine_ptr + 4, low)
    tl.store(mine_ptr + 5, high)
    tl.store(mine_ptr + 6, tokens)
    tl.store(mine_ptr + 7, entropy)
    tl.debug_barrier()  # all of this program's stores come before its ticket
    if tl.atomic_add(counter_ptr, 1) == tl.num_programs(0) - 1:
        which = tl.arange(0, NUM_SUMS)
        totals = tl.load(totals_ptr + which)
        for start in range(0, tl.num_programs(0), BLOCK_P):
            program = start + tl.arange(0, BLOCK_P)
            arrived = (program < tl.num_programs(0))[:, None]
            pointers = partials_ptr + program[:, None] * NUM_SUMS + which[None, :]
            # past the L1 cache, where another program's numbers may be stale
            partials = tl.load(pointers, mask=arrived, other=0.0, cache_modifier=".cg")
            totals = tl.where(
                which == AT_RATIO_MAX,
                tl.maximum(totals, tl.max(partials, axis=0)),  # ratios are > 0
                totals + tl.sum(partials, axis=0),
            )
        tl.store(totals_ptr + which, totals)
        count = tl.sum(tl.where(which == AT_TOKENS, totals, 0.0), axis=0)
        is_mean = (which != AT_LOSS) & (which != AT_RATIO_MAX) & (which != AT_TOKENS)
        means = totals / tl.where(is_mean, tl.maximum(count, 1.0), 1.0)
        tl.store(metrics_ptr + which, means.to(tl.float32))
        tl.store(counter_ptr, 0)
