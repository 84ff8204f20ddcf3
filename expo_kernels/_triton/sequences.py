"""Triton kernel over whole sequences: the loss of any objective from log-probs, and dL/dlogps.

Letters: M positions of the caller's tensors, B sequences, T positions each. Each program processes whole sequences.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton
import triton.language as tl

from expo_kernels._triton.device import (
    add_to_sums,
    clipped_log_ratio,
    gamma_weight,
    kernel,
    no_sums,
    publish,
    rollout_weight_of,
    sequence_advantage,
    token_advantages,
    token_objective,
    total,
    whole_log_ratio,
)
from expo_kernels._triton.slots import MAX_COMPLETION_LENGTH


@triton.jit
def load_block(mask_ptr, logps_ptr, old_logps_ptr, first, start, num_positions, BLOCK_T: tl.constexpr):
    """Positions of a block, whether each is in the sequence, whether it is valid, log-probs and old log-probs."""
    within = start + tl.arange(0, BLOCK_T)
    position = first + within
    in_range = within < num_positions
    keep = tl.load(mask_ptr + position, mask=in_range, other=0) != 0
    logp = tl.load(logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
    old_logp = logp
    if old_logps_ptr is not None:
        old_logp = tl.load(old_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
    return position, in_range, keep, logp, old_logp


@triton.jit
def sum_sequence(
    logps_ptr,
    old_logps_ptr,
    rollout_logps_ptr,
    mask_ptr,
    advantages_ptr,
    first,
    num_positions,
    of_sequence,  # advantage of the sequence
    hyper_ptr,
    ADVANTAGES: tl.constexpr,
    SURROGATE: tl.constexpr,
    SPANS_SEQUENCES: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Number of valid tokens of a sequence, sum of the terms of its log-ratio, and sum of old_logp - rollout_logp."""
    length = 0.0
    log_ratio_sum = 0.0
    difference_sum = 0.0
    for start in range(0, num_positions, BLOCK_T):
        position, _, keep, logp, old_logp = load_block(
            mask_ptr, logps_ptr, old_logps_ptr, first, start, num_positions, BLOCK_T
        )
        length += tl.sum(keep.to(tl.float32), axis=0)
        if SPANS_SEQUENCES or SEQUENCE_CORRECTION:
            difference = logp - old_logp
            if SURROGATE == "gmpo":
                advantage = token_advantages(advantages_ptr, position, keep, of_sequence, ADVANTAGES)
                difference, _, _, _ = clipped_log_ratio(difference, advantage, hyper_ptr)
            elif SURROGATE == "vespo":
                rollout_weight = 1.0 + 0.0 * logp
                if rollout_logps_ptr is not None:
                    reported = tl.load(rollout_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                    rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
                difference = tl.where(keep, whole_log_ratio(difference, rollout_weight, hyper_ptr), 0.0)
            log_ratio_sum += tl.sum(difference, axis=0)
            if SEQUENCE_CORRECTION:
                reported = tl.load(rollout_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                difference_sum += tl.sum(old_logp - reported, axis=0)
    return tl.maximum(length, 1.0), log_ratio_sum, difference_sum


@triton.jit
def add_mean_grad(
    grad_logps_ptr,
    logps_ptr,
    old_logps_ptr,
    mask_ptr,
    advantages_ptr,
    first,
    num_positions,
    of_sequence,  # advantage of the sequence
    mean_grad,  # dL/d(term of a token in the mean log-ratio)
    hyper_ptr,
    ADVANTAGES: tl.constexpr,
    SURROGATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add the gradient through the sequence's mean log-ratio, on which the loss of all its tokens depends."""
    for start in range(0, num_positions, BLOCK_T):
        position, _, keep, logp, old_logp = load_block(
            mask_ptr, logps_ptr, old_logps_ptr, first, start, num_positions, BLOCK_T
        )
        grad = tl.load(grad_logps_ptr + position, mask=keep, other=0.0)
        own_grad = mean_grad
        if SURROGATE == "gmpo":
            advantage = token_advantages(advantages_ptr, position, keep, of_sequence, ADVANTAGES)
            _, clip_grad, _, _ = clipped_log_ratio(logp - old_logp, advantage, hyper_ptr)
            own_grad = mean_grad * clip_grad
        tl.store(grad_logps_ptr + position, grad + own_grad, mask=keep)


@kernel
def sequence_loss_kernel(
    logps_ptr,  # [M] float
    grad_logps_ptr,  # [M] float32, out: dL/dlogps
    entropies_ptr,  # [M] float32 or None: added to the metrics
    grad_entropies_ptr,  # [M] float32, out: dL/dentropies, or None
    losses_ptr,  # [M] float32, out: the loss of each token before its weight, or None
    weights_ptr,  # [M] float: the weight of each token's loss, or None: that of the aggregation
    mask_ptr,  # [M] bool
    starts_ptr,  # [B + 1] cumulative lengths; None: every sequence has tokens_per_sequence positions
    advantages_ptr,  # as in `row_loss_kernel`
    old_logps_ptr,
    ref_logps_ptr,
    rollout_logps_ptr,
    beta_ptr,
    normalizer_ptr,
    entropy_bonus_ptr,  # or None
    hyper_ptr,
    partials_ptr,
    counter_ptr,
    totals_ptr,
    metrics_ptr,
    first_sequence,
    num_sequences,  # of this launch, from first_sequence on
    tokens_per_sequence,
    group_size,
    ADVANTAGES: tl.constexpr,
    SURROGATE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    MEAN_RATIO: tl.constexpr,  # the ratio is exp of the mean of the sequence's log-ratios
    GRAD_OF_MEAN: tl.constexpr,  # its gradient goes to all tokens of the sequence, not to the token's own log-prob
    SEQUENCE_CORRECTION: tl.constexpr,
    GEOMETRIC_MASK: tl.constexpr,  # that correction is 1 or 0, by the mean of the differences
    AVERAGES_TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The loss of some sequences from their log-probs, for any objective, and dL/dlogps."""
    SPANS_SEQUENCES: tl.constexpr = MEAN_RATIO or SURROGATE == "vespo"
    beta = tl.load(beta_ptr).to(tl.float32)
    share = 1.0 / (tl.load(normalizer_ptr).to(tl.float32) * tl.load(hyper_ptr + MAX_COMPLETION_LENGTH))
    sums = no_sums()
    for sequence in range(first_sequence + tl.program_id(0), first_sequence + num_sequences, tl.num_programs(0)):
        if starts_ptr is None:
            first = tl.cast(tokens_per_sequence, tl.int64) * sequence
            num_positions = tokens_per_sequence
        else:
            first = tl.load(starts_ptr + sequence).to(tl.int64)
            num_positions = (tl.load(starts_ptr + sequence + 1).to(tl.int64) - first).to(tl.int32)
        of_sequence = sequence_advantage(advantages_ptr, sequence, group_size, hyper_ptr, ADVANTAGES)
        length, log_ratio_sum, difference_sum = sum_sequence(
            logps_ptr, old_logps_ptr, rollout_logps_ptr, mask_ptr, advantages_ptr, first, num_positions, of_sequence,
            hyper_ptr, ADVANTAGES, SURROGATE, SPANS_SEQUENCES, SEQUENCE_CORRECTION, BLOCK_T,
        )  # fmt: skip
        weight = share
        if AVERAGES_TOKENS:
            weight = share / length
        shared_grad = 0.0
        for start in range(0, num_positions, BLOCK_T):
            position, in_range, keep, logp, old_logp = load_block(
                mask_ptr, logps_ptr, old_logps_ptr, first, start, num_positions, BLOCK_T
            )
            log_ratio = logp - old_logp
            if MEAN_RATIO:
                log_ratio = log_ratio_sum / length + 0.0 * logp
            advantage = token_advantages(advantages_ptr, position, keep, of_sequence, ADVANTAGES)
            rollout_weight = 1.0
            if SURROGATE == "vespo":
                rollout_weight = gamma_weight(log_ratio_sum, advantage, hyper_ptr)
            elif GEOMETRIC_MASK:
                rollout_weight = tl.where(rollout_weight_of(difference_sum / length, hyper_ptr) == 0, 0.0, 1.0)
            elif SEQUENCE_CORRECTION:
                rollout_weight = rollout_weight_of(difference_sum, hyper_ptr)
            elif rollout_logps_ptr is not None:
                reported = tl.load(rollout_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
            loss, ratio_grad, beside, penalty, ratio, low, high = token_objective(
                logp, old_logp, log_ratio, advantage, rollout_weight, position, keep, ref_logps_ptr, beta,
                hyper_ptr, SURROGATE, HAS_DUAL_CLIP, KL, KL_WEIGHTED,
            )  # fmt: skip
            if SURROGATE == "gmpo":
                _, _, low, high = clipped_log_ratio(logp - old_logp, advantage, hyper_ptr)
            if losses_ptr is not None:
                tl.store(losses_ptr + position, tl.where(keep, loss, 0.0), mask=in_range)
            token_weight = weight
            if weights_ptr is not None:
                token_weight = tl.load(weights_ptr + position, mask=keep, other=0.0).to(tl.float32)
            ratio_grad = tl.where(keep, token_weight * ratio_grad, 0.0)
            grad = tl.where(keep, token_weight * beside, 0.0)
            if MEAN_RATIO and GRAD_OF_MEAN:
                shared_grad += tl.sum(ratio_grad, axis=0)
            else:
                grad += ratio_grad
            tl.store(grad_logps_ptr + position, grad, mask=in_range)
            loss_total = total(token_weight * loss, keep)
            entropy_total = tl.full([], 0.0, tl.float64)
            if entropies_ptr is not None:
                entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
                entropy_total = total(entropy, keep)
                if entropy_bonus_ptr is not None:
                    grad_entropy = tl.where(keep, -token_weight * tl.load(entropy_bonus_ptr).to(tl.float32), 0.0)
                    loss_total += total(grad_entropy * entropy, keep)
                    tl.store(grad_entropies_ptr + position, grad_entropy, mask=in_range)
            sums = add_to_sums(
                sums, loss_total, total(penalty, keep), total(ratio, keep), tl.max(tl.where(keep, ratio, 0.0), axis=0),
                total(low.to(tl.float32), keep), total(high.to(tl.float32), keep), total(keep.to(tl.float32), keep),
                entropy_total,
            )  # fmt: skip
        if MEAN_RATIO and GRAD_OF_MEAN:
            add_mean_grad(
                grad_logps_ptr, logps_ptr, old_logps_ptr, mask_ptr, advantages_ptr, first, num_positions, of_sequence,
                shared_grad / length, hyper_ptr, ADVANTAGES, SURROGATE, BLOCK_T,
            )  # fmt: skip
    publish(partials_ptr, counter_ptr, totals_ptr, metrics_ptr, sums)
