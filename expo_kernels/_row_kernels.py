"""Triton kernels over rows of logits: log-probs and entropies, the policy loss and its gradient.

Every kernel on logits is made of the device functions in `_device.py`. Programs are persistent: each takes every
num_programs-th row, sums loss and metrics in float64, and the last to finish adds the programs' sums up in order, so
that one launch gives equal bits every time.

Letters: M positions of the caller's tensors, n rows of one launch, V vocabulary, B sequences, T positions of each.
Row r of a launch is position `order[first_row + r]`, or `first_row + r` without an `order`. What is masked, or has an
id outside [0, V), is never read: it counts for nothing and its gradient is 0.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: its arguments are what Triton makes of pointers and numbers

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from expo_kernels._device import (
    LENGTH,
    LOG2_E,
    TEMPERATURE,
    chosen_logit,
    clipped_log_ratio,
    gamma_weight,
    group_advantage,
    locate,
    publish,
    read_row,
    rollout_weight_of,
    row_offset,
    token_advantages,
    token_objective,
    whole_log_ratio,
    write_slopes,
)

# whatever these are, the code is the same: sizes, strides and everything that is not [n, V]
_RUN_TIME = (
    "first_row",
    "num_rows",
    "num_values",
    "factor_ptr",
    "rows_per_batch",
    "batch_stride",
    "row_stride",
    "grad_batch_stride",
    "grad_row_stride",
    "vocab_size",
    "tokens_per_sequence",
    "first_sequence",
    "num_sequences",
    "group_size",
    "residuals_ptr",
    "logps_ptr",
    "entropies_ptr",
    "tops_ptr",
    "sums_ptr",
    "slopes_ptr",
    "grad_logps_ptr",
    "grad_entropies_ptr",
    "order_ptr",
    "mask_ptr",
    "ids_ptr",
    "sequence_ptr",
    "starts_ptr",
    "advantages_ptr",
    "old_logps_ptr",
    "ref_logps_ptr",
    "rollout_logps_ptr",
    "lengths_ptr",
    "beta_ptr",
    "normalizer_ptr",
    "entropy_bonus_ptr",
    "entropy_slopes_ptr",
    "hyper_ptr",
    "partials_ptr",
    "counter_ptr",
    "totals_ptr",
    "metrics_ptr",
)


def _kernel(function: Callable[..., None]) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _RUN_TIME if name in names])


@_kernel
def row_logps_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    logps_ptr,  # [M] float32, out
    entropies_ptr,  # [M] float32, out, or None
    tops_ptr,  # [M] float32, out: largest logit of each row, or None
    sums_ptr,  # [M] float32, out: sum of exp((logit - top) / temperature), or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool or None
    ids_ptr,  # [M] integers
    hyper_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    vocab_size,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Log-probs of the chosen tokens, entropies where asked for, and what the gradient will need."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_ENTROPY: tl.constexpr = entropies_ptr is not None
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
        row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        top, total, moment = read_row(row_ptr, keep, vocab_size, hyper_ptr, HAS_SOFTCAP, HAS_ENTROPY, BLOCK_V)
        chosen, _ = chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP)
        log_total = tl.log(tl.where(keep, total, 1.0))
        logp = (chosen - top) / tl.load(hyper_ptr + TEMPERATURE) - log_total
        tl.store(logps_ptr + position, tl.where(keep, logp, 0.0))
        if HAS_ENTROPY:
            tl.store(entropies_ptr + position, tl.where(keep, log_total - moment / LOG2_E / total, 0.0))
        if tops_ptr is not None:
            tl.store(tops_ptr + position, top)
            tl.store(sums_ptr + position, total)


@_kernel
def row_slopes_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    grad_ptr,  # the same shape, out
    residuals_ptr,  # [n] float32, out: what rounding took from the chosen column, or None
    tops_ptr,  # [M] as written by `row_logps_kernel`
    sums_ptr,  # [M]
    grad_logps_ptr,  # [M] float32
    entropies_ptr,  # [M] float32 or None
    grad_entropies_ptr,  # [M] float32 or None
    order_ptr,
    mask_ptr,
    ids_ptr,
    hyper_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    grad_batch_stride,
    grad_row_stride,
    vocab_size,
    HAS_SOFTCAP: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dL/dlogits, given dL/dlogps and, where there are any, dL/dentropies."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_ENTROPY: tl.constexpr = grad_entropies_ptr is not None
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
        top = tl.load(tops_ptr + position, mask=keep, other=0.0)
        total = tl.load(sums_ptr + position, mask=keep, other=1.0)
        logp_slope = tl.load(grad_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
        entropy = tl.full([], 0.0, tl.float32)
        entropy_slope = entropy
        if HAS_ENTROPY:
            entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
            entropy_slope = tl.load(grad_entropies_ptr + position, mask=keep, other=0.0).to(tl.float32)
        residual = write_slopes(
            grad_ptr + row_offset(row, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNMENT),
            logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT),
            chosen_id,
            logp_slope,
            entropy_slope,
            entropy,
            top,
            total,
            keep,
            vocab_size,
            hyper_ptr,
            HAS_SOFTCAP,
            HAS_ENTROPY,
            GRAD_SHARES_MEMORY,
            BLOCK_V,
        )
        if residuals_ptr is not None:
            tl.store(residuals_ptr + row, residual)


@_kernel
def row_loss_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    grad_ptr,  # the same shape, out, or None: the loss alone
    residuals_ptr,  # [n] float32, out: what rounding took from the chosen column, or None
    logps_ptr,  # [M] float32, out
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    ids_ptr,  # [M] integers
    sequence_ptr,  # [M] integers: the sequence of each position; None: position // tokens_per_sequence
    advantages_ptr,  # [M], [B], or the [B] rewards that make them: see ADVANTAGES
    old_logps_ptr,  # [M] or None: on-policy
    ref_logps_ptr,  # [M] or None: no penalty
    rollout_logps_ptr,  # [M] or None: no correction
    lengths_ptr,  # [B] valid tokens of each sequence, or None: the loss does not average over them
    beta_ptr,
    normalizer_ptr,
    entropy_bonus_ptr,  # or None
    hyper_ptr,
    partials_ptr,
    counter_ptr,
    totals_ptr,
    metrics_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    grad_batch_stride,
    grad_row_stride,
    vocab_size,
    tokens_per_sequence,
    group_size,
    ADVANTAGES: tl.constexpr,
    SURROGATE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The whole loss of a token-level objective: log-probs, metrics and dL/dlogits in one launch."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_BONUS: tl.constexpr = entropy_bonus_ptr is not None
    temperature = tl.load(hyper_ptr + TEMPERATURE)
    beta = tl.load(beta_ptr).to(tl.float32)
    share = 1.0 / (tl.load(normalizer_ptr).to(tl.float32) * tl.load(hyper_ptr + LENGTH))
    loss_sum = tl.full([], 0.0, tl.float64)
    kl_sum = loss_sum
    ratio_sum = loss_sum
    ratio_max = loss_sum
    low_count = loss_sum
    high_count = loss_sum
    num_tokens = loss_sum
    entropy_sum = loss_sum
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
        row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        top, total, moment = read_row(row_ptr, keep, vocab_size, hyper_ptr, HAS_SOFTCAP, HAS_ENTROPY, BLOCK_V)
        chosen, _ = chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP)
        log_total = tl.log(tl.where(keep, total, 1.0))
        logp = tl.where(keep, (chosen - top) / temperature - log_total, 0.0)
        tl.store(logps_ptr + position, logp)
        logp_slope = tl.full([], 0.0, tl.float32)
        entropy_slope = logp_slope
        entropy = logp_slope
        if keep:
            if sequence_ptr is None:
                sequence = position // tokens_per_sequence
            else:
                sequence = tl.load(sequence_ptr + position).to(tl.int64)
            if ADVANTAGES == "rewards":
                advantage = group_advantage(advantages_ptr, sequence, group_size, hyper_ptr)
            elif ADVANTAGES == "sequence":
                advantage = tl.load(advantages_ptr + sequence).to(tl.float32)
            else:
                advantage = tl.load(advantages_ptr + position).to(tl.float32)
            old_logp = logp
            if old_logps_ptr is not None:
                old_logp = tl.load(old_logps_ptr + position).to(tl.float32)
            rollout_weight = 1.0
            if rollout_logps_ptr is not None:
                reported = tl.load(rollout_logps_ptr + position).to(tl.float32)
                rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
            weight = share
            if lengths_ptr is not None:
                weight = share / tl.load(lengths_ptr + sequence).to(tl.float32)
            if HAS_BONUS:
                # read here, it takes no register through the loops over the row: on sm_80 there is none left
                beta = tl.load(beta_ptr).to(tl.float32)
            loss, ratio_slope, beside, penalty, ratio, low, high = token_objective(
                logp,
                old_logp,
                logp - old_logp,
                advantage,
                rollout_weight,
                position,
                keep,
                ref_logps_ptr,
                beta,
                hyper_ptr,
                SURROGATE,
                HAS_DUAL_CLIP,
                KL,
                KL_WEIGHTED,
            )
            logp_slope = weight * (ratio_slope + beside)
            loss = weight * loss
            kl_sum += penalty.to(tl.float64)
            ratio_sum += ratio.to(tl.float64)
            ratio_max = tl.maximum(ratio_max, ratio.to(tl.float64))
            low_count += low.to(tl.float64)
            high_count += high.to(tl.float64)
            num_tokens += 1.0
            if HAS_ENTROPY:
                entropy = log_total - moment / LOG2_E / total
                entropy_sum += entropy.to(tl.float64)
            if HAS_BONUS:
                entropy_slope = -weight * tl.load(entropy_bonus_ptr).to(tl.float32)
                loss += entropy_slope * entropy
            loss_sum += loss.to(tl.float64)
        if grad_ptr is not None:
            residual = write_slopes(
                grad_ptr + row_offset(row, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNMENT),
                row_ptr,
                chosen_id,
                logp_slope,
                entropy_slope,
                entropy,
                top,
                total,
                keep,
                vocab_size,
                hyper_ptr,
                HAS_SOFTCAP,
                HAS_BONUS,
                GRAD_SHARES_MEMORY,
                BLOCK_V,
            )
            if residuals_ptr is not None:
                tl.store(residuals_ptr + row, residual)
    publish(
        partials_ptr,
        counter_ptr,
        totals_ptr,
        metrics_ptr,
        loss_sum,
        kl_sum,
        ratio_sum,
        ratio_max,
        low_count,
        high_count,
        num_tokens,
        entropy_sum,
    )


@_kernel
def sequence_loss_kernel(
    logps_ptr,  # [M] float
    slopes_ptr,  # [M] float32, out: dL/dlogps
    entropies_ptr,  # [M] float32 or None: summed into the metrics
    entropy_slopes_ptr,  # [M] float32, out: dL/dentropies, or None
    mask_ptr,  # [M] bool
    starts_ptr,  # [B + 1] where each sequence starts and ends; None: every tokens_per_sequence
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
    num_sequences,  # from the first on
    tokens_per_sequence,
    group_size,
    ADVANTAGES: tl.constexpr,
    SURROGATE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    MEAN_RATIO: tl.constexpr,  # of the sequence's log-ratios
    SEQUENCE_CORRECTION: tl.constexpr,
    AVERAGES_TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The loss of some sequences given their log-probs: each program takes whole ones. Any objective, dL/dlogps."""
    SPANS_SEQUENCES: tl.constexpr = MEAN_RATIO or SURROGATE == "vespo"
    beta = tl.load(beta_ptr).to(tl.float32)
    share = 1.0 / (tl.load(normalizer_ptr).to(tl.float32) * tl.load(hyper_ptr + LENGTH))
    loss_sum = tl.full([], 0.0, tl.float64)
    kl_sum = loss_sum
    ratio_sum = loss_sum
    ratio_max = loss_sum
    low_count = loss_sum
    high_count = loss_sum
    num_tokens = loss_sum
    entropy_sum = loss_sum
    for sequence in range(first_sequence + tl.program_id(0), first_sequence + num_sequences, tl.num_programs(0)):
        if starts_ptr is None:
            first = tl.cast(tokens_per_sequence, tl.int64) * sequence
            num_positions = tokens_per_sequence
        else:
            first = tl.load(starts_ptr + sequence).to(tl.int64)
            num_positions = (tl.load(starts_ptr + sequence + 1).to(tl.int64) - first).to(tl.int32)
        sequence_advantage = 0.0
        if ADVANTAGES == "rewards":
            sequence_advantage = group_advantage(advantages_ptr, sequence, group_size, hyper_ptr)
        elif ADVANTAGES == "sequence":
            sequence_advantage = tl.load(advantages_ptr + sequence).to(tl.float32)
        length = 0.0
        log_ratio_sum = 0.0
        difference_sum = 0.0
        for start in range(0, num_positions, BLOCK_T):
            within = start + tl.arange(0, BLOCK_T)
            position = first + within
            keep = tl.load(mask_ptr + position, mask=within < num_positions, other=0) != 0
            length += tl.sum(keep.to(tl.float32), axis=0)
            if SPANS_SEQUENCES or SEQUENCE_CORRECTION:
                logp = tl.load(logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                old_logp = logp
                if old_logps_ptr is not None:
                    old_logp = tl.load(old_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                difference = logp - old_logp
                if SURROGATE == "gmpo":
                    advantage = token_advantages(advantages_ptr, position, keep, sequence_advantage, ADVANTAGES)
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
        length = tl.maximum(length, 1.0)
        weight = share
        if AVERAGES_TOKENS:
            weight = share / length
        shared_slope = 0.0
        for start in range(0, num_positions, BLOCK_T):
            within = start + tl.arange(0, BLOCK_T)
            position = first + within
            keep = tl.load(mask_ptr + position, mask=within < num_positions, other=0) != 0
            logp = tl.load(logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
            old_logp = logp
            if old_logps_ptr is not None:
                old_logp = tl.load(old_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
            log_ratio = logp - old_logp
            if MEAN_RATIO:
                log_ratio = log_ratio_sum / length + 0.0 * logp
            advantage = token_advantages(advantages_ptr, position, keep, sequence_advantage, ADVANTAGES)
            rollout_weight = 1.0
            if SURROGATE == "vespo":
                rollout_weight = gamma_weight(log_ratio_sum, advantage, hyper_ptr)
            elif SEQUENCE_CORRECTION:
                rollout_weight = rollout_weight_of(difference_sum, hyper_ptr)
            elif rollout_logps_ptr is not None:
                reported = tl.load(rollout_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
            loss, ratio_slope, beside, penalty, ratio, low, high = token_objective(
                logp,
                old_logp,
                log_ratio,
                advantage,
                rollout_weight,
                position,
                keep,
                ref_logps_ptr,
                beta,
                hyper_ptr,
                SURROGATE,
                HAS_DUAL_CLIP,
                KL,
                KL_WEIGHTED,
            )
            if SURROGATE == "gmpo":
                _, _, low, high = clipped_log_ratio(logp - old_logp, advantage, hyper_ptr)
            ratio_slope = tl.where(keep, weight * ratio_slope, 0.0)
            slope = tl.where(keep, weight * beside, 0.0)
            if MEAN_RATIO:
                shared_slope += tl.sum(ratio_slope, axis=0)
            else:
                slope += ratio_slope
            tl.store(slopes_ptr + position, slope, mask=within < num_positions)
            loss_sum += tl.sum(tl.where(keep, weight * loss, 0.0).to(tl.float64), axis=0)
            kl_sum += tl.sum(tl.where(keep, penalty, 0.0).to(tl.float64), axis=0)
            ratio_sum += tl.sum(tl.where(keep, ratio, 0.0).to(tl.float64), axis=0)
            ratio_max = tl.maximum(ratio_max, tl.max(tl.where(keep, ratio, 0.0), axis=0).to(tl.float64))
            low_count += tl.sum((low & keep).to(tl.float64), axis=0)
            high_count += tl.sum((high & keep).to(tl.float64), axis=0)
            num_tokens += tl.sum(keep.to(tl.float64), axis=0)
            if entropies_ptr is not None:
                entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
                entropy_sum += tl.sum(entropy.to(tl.float64), axis=0)
                if entropy_bonus_ptr is not None:
                    entropy_slope = tl.where(keep, -weight * tl.load(entropy_bonus_ptr).to(tl.float32), 0.0)
                    loss_sum += tl.sum((entropy_slope * entropy).to(tl.float64), axis=0)
                    tl.store(entropy_slopes_ptr + position, entropy_slope, mask=within < num_positions)
        if MEAN_RATIO:
            # each token moves the sequence's mean log-ratio, and with it every token's loss
            for start in range(0, num_positions, BLOCK_T):
                within = start + tl.arange(0, BLOCK_T)
                position = first + within
                keep = tl.load(mask_ptr + position, mask=within < num_positions, other=0) != 0
                slope = tl.load(slopes_ptr + position, mask=keep, other=0.0)
                mean_slope = shared_slope / length
                if SURROGATE == "gmpo":
                    advantage = token_advantages(advantages_ptr, position, keep, sequence_advantage, ADVANTAGES)
                    difference = tl.zeros([BLOCK_T], tl.float32)
                    if old_logps_ptr is not None:
                        difference = tl.load(logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                        difference -= tl.load(old_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
                    _, own_slope, _, _ = clipped_log_ratio(difference, advantage, hyper_ptr)
                    mean_slope *= own_slope
                tl.store(slopes_ptr + position, slope + mean_slope, mask=keep)
    publish(
        partials_ptr,
        counter_ptr,
        totals_ptr,
        metrics_ptr,
        loss_sum,
        kl_sum,
        ratio_sum,
        ratio_max,
        low_count,
        high_count,
        num_tokens,
        entropy_sum,
    )


@_kernel
def scale_kernel(
    values_ptr,  # [num_values] any float dtype, changed in place
    factor_ptr,
    num_values,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values *= factor; where the factor is 1, as for a loss that is not scaled, nothing is read."""
    num_values = tl.cast(num_values, tl.int64) * ALIGNMENT
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_range = offset < num_values
        values = tl.load(values_ptr + offset, mask=in_range, other=0.0)
        tl.store(values_ptr + offset, (values.to(tl.float32) * factor).to(values.dtype), mask=in_range)
