"""Triton device functions of the objective: a token's loss and its derivatives, a group's advantage, and ordered sums.

Source: the formulas are those of `reference.py` (FG-ExPO, arXiv 2605.11403, eq. 1 to 3). Each gradient is beside its
formula; the interpreter tests compare them with float64 autograd. A new surrogate is a branch of `_surrogate`.

Letters: G rollouts per question.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from expo_kernels._inputs import METRIC_NAMES
from expo_kernels._triton.slots import (
    CLIP_HIGH,
    CLIP_LOW,
    DUAL_CLIP,
    LOG_RATIO_CLAMP,
    RATIO_HIGH,
    RATIO_LOW,
    REWARD_EPS,
    ROLLOUT_CAP,
    ROLLOUT_FLOOR,
    ROLLOUT_KEPT,
    SAPO_TAU_NEG,
    SAPO_TAU_POS,
    VESPO_K_NEG,
    VESPO_K_POS,
    VESPO_LAMBDA_NEG,
    VESPO_LAMBDA_POS,
)

NUM_METRICS = tl.constexpr(len(METRIC_NAMES))
AT_LOSS = tl.constexpr(METRIC_NAMES.index("loss"))
AT_RATIO_MAX = tl.constexpr(METRIC_NAMES.index("ratio_max"))
AT_TOKENS = tl.constexpr(METRIC_NAMES.index("tokens"))

BLOCK_G = tl.constexpr(64)  # rewards read at once; larger groups take several iterations
BLOCK_P = tl.constexpr(32)  # number of programs whose sums are added at once

# Triton specialises a binary for the alignment of these pointers: aligned ones allow 128-bit accesses
_WIDE = ("logits_ptr", "grad_ptr", "values_ptr", "exponentials_ptr")


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` without specialisation for sizes, strides, and pointers other than those to [n, V]."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    run_time = [name for name in names if name not in function.__annotations__ and name not in _WIDE]
    return triton.jit(function, do_not_specialize=run_time)


# --- the objective of a token; all values are scalars or blocks


@triton.jit
def _clamp(values, bound):
    low = tl.maximum(values, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _surrogate(log_ratio, logp, advantage, hyper_ptr, SURROGATE: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr):
    """Eq. 2, negated: loss, dloss/dlog_ratio, direct dloss/dlogp, ratio, and which clipped term was chosen."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    ratio = tl.exp(_clamp(log_ratio, bound))
    # a clamped log-ratio has no gradient
    ratio_grad = tl.where(tl.abs(log_ratio) <= bound, ratio, 0.0)
    low = ratio < tl.load(hyper_ptr + RATIO_LOW)
    high = ratio > tl.load(hyper_ptr + RATIO_HIGH)
    clipped = tl.where(low, tl.load(hyper_ptr + RATIO_LOW), tl.where(high, tl.load(hyper_ptr + RATIO_HIGH), ratio))
    logp_grad = 0.0 * ratio
    if SURROGATE == "sapo":
        tau = tl.where(advantage > 0, tl.load(hyper_ptr + SAPO_TAU_POS), tl.load(hyper_ptr + SAPO_TAU_NEG))
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 * gate * advantage / tau
        ratio_grad *= -4.0 * gate * (1.0 - gate) * advantage
        low = low & False
        high = high & False
    elif SURROGATE == "cispo":
        logp_grad = -clipped * advantage
        loss = logp_grad * logp
        ratio_grad = 0.0 * ratio
    elif SURROGATE == "vespo":
        # the caller passes the sequence's weight as rollout_weight
        logp_grad = -advantage + 0.0 * logp
        loss = logp_grad * logp
        ratio_grad = 0.0 * ratio
        low = low & False
        high = high & False
    elif SURROGATE == "dppo_tv":
        # the log-ratio is the token's own
        moved = tl.exp(logp) - tl.exp(logp - log_ratio)
        low = (moved < -tl.load(hyper_ptr + CLIP_LOW)) & (advantage < 0)
        high = (moved > tl.load(hyper_ptr + CLIP_HIGH)) & (advantage > 0)
        loss = tl.where(low | high, 0.0, -ratio * advantage)
        ratio_grad = tl.where(low | high, 0.0, -advantage * ratio_grad)
    elif SURROGATE == "gmpo":
        # the log-ratio is the mean of the sequence's clipped log-ratios
        loss = -ratio * advantage
        ratio_grad = -advantage * ratio_grad
        low = low & False
        high = high & False
    else:
        loss = -tl.minimum(ratio * advantage, clipped * advantage, propagate_nan=tl.PropagateNan.ALL)
        is_clipped = (low & (advantage < 0)) | (high & (advantage > 0))
        ratio_grad = tl.where(is_clipped, 0.0, -advantage * ratio_grad)
        if HAS_DUAL_CLIP:
            cap = -tl.load(hyper_ptr + DUAL_CLIP) * advantage
            is_capped = (advantage < 0) & (cap < loss)
            loss = tl.where(is_capped, cap, loss)
            ratio_grad = tl.where(is_capped, 0.0, ratio_grad)
            high = (high & (advantage > 0)) | is_capped
        else:
            high = high & (advantage > 0)
        low = low & (advantage < 0)
    return loss, ratio_grad, logp_grad, ratio, low, high


@triton.jit
def _penalty(logp, ref_logp, hyper_ptr, KL: tl.constexpr):
    """Eq. 3 (k3), or k1 or k2: penalty in nats, and dpenalty/dlogp."""
    difference = ref_logp - logp
    if KL == "k1":
        penalty = -difference
        grad = 1.0 + 0.0 * logp
    elif KL == "k2":
        penalty = 0.5 * difference * difference
        grad = -difference
    else:
        bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
        x = _clamp(difference, bound)
        # exp(x) - x - 1 as a series near 0, where the difference would lose all digits
        series = 1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880))
        series = 1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series)))
        penalty = tl.where(tl.abs(x) < 0.5, x * x * (0.5 + x * series), tl.exp(x) - x - 1.0)
        grad = -(penalty + x)
        grad = tl.where(tl.abs(difference) <= bound, grad, 0.0)
    return penalty, grad


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
    """Loss of a token, dloss/dlog_ratio, direct dloss/dlogp, penalty, ratio, clipped low and clipped high."""
    loss, ratio_grad, logp_grad, ratio, low, high = _surrogate(
        log_ratio, logp, advantage, hyper_ptr, SURROGATE, HAS_DUAL_CLIP
    )
    loss *= rollout_weight
    ratio_grad *= rollout_weight
    logp_grad *= rollout_weight
    penalty = 0.0 * logp
    if ref_logps_ptr is not None:
        ref_logp = tl.load(ref_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
        penalty, penalty_grad = _penalty(logp, ref_logp, hyper_ptr, KL)
        if KL_WEIGHTED:
            bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
            difference = logp - old_logp
            weight = tl.exp(_clamp(difference, bound))
            penalty = penalty * weight
            penalty_grad = penalty_grad * weight + tl.where(tl.abs(difference) <= bound, penalty, 0.0)
        loss += beta * penalty
        logp_grad += beta * penalty_grad
    return loss, ratio_grad, logp_grad, penalty, ratio, low, high


@triton.jit
def group_advantage(rewards_ptr, sequence, group_size, hyper_ptr):
    """Eq. 1: advantage of one reward relative to its group; population std; exactly 0 if all rewards are equal."""
    first = (sequence // group_size).to(tl.int64) * group_size
    own = tl.load(rewards_ptr + sequence).to(tl.float32)
    # subtract the group's first reward, which cancels, so that means of nearly equal rewards keep their digits
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
def sequence_advantage(advantages_ptr, sequence, group_size, hyper_ptr, ADVANTAGES: tl.constexpr):
    """Advantage of a sequence; 0 if advantages are per token."""
    advantage = 0.0
    if ADVANTAGES == "rewards":
        advantage = group_advantage(advantages_ptr, sequence, group_size, hyper_ptr)
    elif ADVANTAGES == "sequence":
        advantage = tl.load(advantages_ptr + sequence).to(tl.float32)
    return advantage


@triton.jit
def token_advantages(advantages_ptr, position, keep, of_sequence, ADVANTAGES: tl.constexpr):
    """Advantages of a block of positions of one sequence."""
    if ADVANTAGES == "token":
        return tl.load(advantages_ptr + position, mask=keep, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - a branch that is not taken must not be compiled
        return tl.where(keep, of_sequence, 0.0)


@triton.jit
def rollout_weight_of(difference, hyper_ptr):
    """Weight of a token's surrogate that corrects the mismatch between sampler and trainer: exp(difference).

    Out of [floor, cap] it is the bound, or 0 if the correction masks.
    """
    weight = tl.exp(_clamp(difference, tl.load(hyper_ptr + LOG_RATIO_CLAMP)))
    floor = tl.load(hyper_ptr + ROLLOUT_FLOOR)
    cap = tl.load(hyper_ptr + ROLLOUT_CAP)
    kept = tl.load(hyper_ptr + ROLLOUT_KEPT)
    return tl.where(weight > cap, cap * kept, tl.where(weight < floor, floor * kept, weight))


@triton.jit
def clipped_log_ratio(difference, advantage, hyper_ptr):
    """GMPO: a token's clipped log-ratio, its derivative (1 or 0), clipped low and clipped high."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    lowest = tl.log(tl.load(hyper_ptr + RATIO_LOW))
    highest = tl.log(tl.load(hyper_ptr + RATIO_HIGH))
    x = _clamp(difference, bound)
    low = (x < lowest) & (advantage < 0)
    high = (x > highest) & (advantage > 0)
    grad = tl.where(low | high, 0.0, tl.where(tl.abs(difference) <= bound, 1.0, 0.0))
    return tl.where(low, lowest, tl.where(high, highest, x)), grad, low, high


@triton.jit
def whole_log_ratio(difference, rollout_weight, hyper_ptr):
    """VESPO: the term of a token in its sequence's log-ratio, with the rollout correction."""
    bound = tl.load(hyper_ptr + LOG_RATIO_CLAMP)
    is_kept = rollout_weight != 0
    correction = tl.where(is_kept, tl.log(tl.where(is_kept, rollout_weight, 1.0)), -bound)
    return _clamp(difference, bound) + _clamp(correction, bound)


@triton.jit
def gamma_weight(log_ratio, advantage, hyper_ptr):
    """VESPO: w^k exp(decay (1 - w)), where w is a sequence's ratio; k and decay depend on the advantage's sign."""
    log_ratio = _clamp(log_ratio, tl.load(hyper_ptr + LOG_RATIO_CLAMP))
    is_gain = advantage >= 0
    k = tl.where(is_gain, tl.load(hyper_ptr + VESPO_K_POS), tl.load(hyper_ptr + VESPO_K_NEG))
    decay = tl.where(is_gain, tl.load(hyper_ptr + VESPO_LAMBDA_POS), tl.load(hyper_ptr + VESPO_LAMBDA_NEG))
    return tl.exp(decay + k * log_ratio - decay * tl.exp(log_ratio))


# --- sums over tokens and programs


@triton.jit
def no_sums():
    """Zero sums, [NUM_METRICS] float64 in the order of METRIC_NAMES: a block takes fewer registers than scalars do."""
    return tl.zeros([NUM_METRICS], tl.float64)


@triton.jit
def add_to_sums(sums, loss, kl, ratio, ratio_max, low, high, tokens, entropy):
    """`sums` plus the loss and the metrics of one token, or of a block of tokens; `ratio_max` is a maximum."""
    which = tl.arange(0, NUM_METRICS)
    values = tl.where(which == 0, loss.to(tl.float64), 0.0)
    values = tl.where(which == 1, kl.to(tl.float64), values)
    values = tl.where(which == 2, ratio.to(tl.float64), values)
    values = tl.where(which == AT_RATIO_MAX, ratio_max.to(tl.float64), values)
    values = tl.where(which == 4, low.to(tl.float64), values)
    values = tl.where(which == 5, high.to(tl.float64), values)
    values = tl.where(which == AT_TOKENS, tokens.to(tl.float64), values)
    values = tl.where(which == 7, entropy.to(tl.float64), values)
    return tl.where(which == AT_RATIO_MAX, tl.maximum(sums, values), sums + values)


@triton.jit
def total(values, keep):
    """Sum in float64 over the valid tokens."""
    return tl.sum(tl.where(keep, values, 0.0).to(tl.float64), axis=0)


@triton.jit
def publish(
    partials_ptr,  # [num_programs, NUM_METRICS] float64
    counter_ptr,  # [1] int32, 0 before and after the launch
    totals_ptr,  # [NUM_METRICS] float64, sums over all launches so far
    metrics_ptr,  # [NUM_METRICS] float32, out: loss and metrics of all launches so far
    sums,
):
    """Write this program's sums; the last program to finish adds all programs' sums to the totals in a fixed order."""
    which = tl.arange(0, NUM_METRICS)
    tl.store(partials_ptr + tl.program_id(0) * NUM_METRICS + which, sums)
    tl.debug_barrier()  # all stores of this program precede its atomic increment
    if tl.atomic_add(counter_ptr, 1) == tl.num_programs(0) - 1:
        totals = tl.load(totals_ptr + which)
        for start in range(0, tl.num_programs(0), BLOCK_P):
            program = start + tl.arange(0, BLOCK_P)
            arrived = (program < tl.num_programs(0))[:, None]
            pointers = partials_ptr + program[:, None] * NUM_METRICS + which[None, :]
            # .cg bypasses the L1 cache, which may hold stale sums of other programs
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
