"""Triton kernels over rows of logits: log-probs and entropies, the policy loss and its gradient.

Programs are persistent: each processes every num_programs-th row and sums loss and metrics in float64. The last program
to finish adds all programs' sums in order, so that a launch gives equal bits in every run. `row.py` has what they do
with one row.

Letters: M positions of the caller's tensors, n rows of one launch, V vocabulary, B sequences, T positions each. Row r
of a launch is position `order[first_row + r]`, or `first_row + r` without an `order`. Rows that are masked, or whose id
is outside [0, V), are never read: they add nothing to loss and metrics, and their gradient is 0. `shards.py` has the
kernels of a head that is sharded over the vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton.language as tl

from expo_kernels._triton.device import (
    add_to_sums,
    kernel,
    no_sums,
    publish,
    rollout_weight_of,
    sequence_advantage,
    token_objective,
)
from expo_kernels._triton.row import (
    LOG2_E,
    chosen_logit,
    locate,
    read_row,
    row_offset,
    temperature_of,
    write_grad_logits,
)
from expo_kernels._triton.slots import MAX_COMPLETION_LENGTH


@kernel
def row_logps_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    logps_ptr,  # [M] float32, out
    entropies_ptr,  # [M] float32, out, or None
    row_max_ptr,  # [M] float32, out: maximum of each row, or None
    sum_exp_ptr,  # [M] float32, out: sum of exp((logit - maximum) / temperature), or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool or None
    ids_ptr,  # [M] integers
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    vocab_size,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WIDE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Log-probs of the chosen tokens, and, if wanted, entropies and the row values that the gradient needs."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_ENTROPY: tl.constexpr = entropies_ptr is not None
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
        row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        temperature_ptr = temperature_of(position, temperatures_ptr, hyper_ptr)
        row_max, sum_exp, entropy_sum = read_row(
            row_ptr, keep, vocab_size, temperature_ptr, hyper_ptr, HAS_SOFTCAP, HAS_ENTROPY, HAS_WIDE_ROWS, BLOCK_V
        )
        chosen, _ = chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP)
        log_sum_exp = tl.log(tl.where(keep, sum_exp, 1.0))
        logp = (chosen - row_max) / tl.load(temperature_ptr) - log_sum_exp
        tl.store(logps_ptr + position, tl.where(keep, logp, 0.0))
        if HAS_ENTROPY:
            tl.store(entropies_ptr + position, tl.where(keep, log_sum_exp - entropy_sum / LOG2_E / sum_exp, 0.0))
        if row_max_ptr is not None:
            tl.store(row_max_ptr + position, row_max)
            tl.store(sum_exp_ptr + position, sum_exp)


@kernel
def row_grad_logits_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    grad_ptr,  # the same shape, out
    residual_ptr,  # [n] float32, out: rounding error of the chosen column, or None
    row_max_ptr,  # [M] as written by `row_logps_kernel` or `combine_shards_kernel`
    sum_exp_ptr,  # [M]
    grad_logps_ptr,  # [M] float32
    entropies_ptr,  # [M] float32 or None
    grad_entropies_ptr,  # [M] float32 or None
    grad_lse_ptr,  # [M] float32 or None
    order_ptr,
    mask_ptr,
    ids_ptr,
    temperatures_ptr,
    hyper_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    grad_batch_stride,
    grad_row_stride,
    vocab_size,
    IS_SHARD: tl.constexpr,  # see `locate`
    HAS_SOFTCAP: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dL/dlogits from dL/dlogps and, if given, dL/dentropies and dL/dlse."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_ENTROPY: tl.constexpr = grad_entropies_ptr is not None
    HAS_LSE: tl.constexpr = grad_lse_ptr is not None
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size, IS_SHARD)
        row_max = tl.load(row_max_ptr + position, mask=keep, other=0.0)
        sum_exp = tl.load(sum_exp_ptr + position, mask=keep, other=1.0)
        grad_logp = tl.load(grad_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
        entropy = tl.full([], 0.0, tl.float32)
        grad_entropy = entropy
        if HAS_ENTROPY:
            entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
            grad_entropy = tl.load(grad_entropies_ptr + position, mask=keep, other=0.0).to(tl.float32)
        grad_lse = tl.full([], 0.0, tl.float32)
        if HAS_LSE:
            grad_lse = tl.load(grad_lse_ptr + position, mask=keep, other=0.0).to(tl.float32)
        residual = write_grad_logits(
            grad_ptr + row_offset(row, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNMENT),
            logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT),
            chosen_id,
            grad_logp,
            grad_entropy,
            entropy,
            row_max,
            sum_exp,
            keep,
            vocab_size,
            temperature_of(position, temperatures_ptr, hyper_ptr),
            hyper_ptr,
            HAS_SOFTCAP,
            HAS_ENTROPY,
            GRAD_SHARES_MEMORY,
            BLOCK_V,
            grad_lse,
            HAS_LSE,
        )
        if residual_ptr is not None:
            if IS_SHARD:
                residual = tl.where(chosen_id >= 0, residual, 0.0)
            tl.store(residual_ptr + row, residual)


@kernel
def row_loss_kernel(
    logits_ptr,  # [n, V] or strided, any float dtype
    grad_ptr,  # the same shape, out, or None: no gradient
    residual_ptr,  # [n] float32, out: rounding error of the chosen column, or None
    logps_ptr,  # [M] float32, out
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    ids_ptr,  # [M] integers
    sequence_ptr,  # [M] integers: the sequence of each position; None: position // tokens_per_sequence
    advantages_ptr,  # [M], [B], or rewards [B]: see ADVANTAGES
    old_logps_ptr,  # [M] or None: on-policy
    ref_logps_ptr,  # [M] or None: no penalty
    rollout_logps_ptr,  # [M] or None: no correction
    lengths_ptr,  # [B] number of valid tokens of each sequence, or None: the loss does not average over them
    beta_ptr,
    normalizer_ptr,
    entropy_bonus_ptr,  # or None
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
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
    HAS_WIDE_ROWS: tl.constexpr,
    GRAD_SHARES_MEMORY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The whole loss of a token-level objective: log-probs, metrics and dL/dlogits in one launch."""
    vocab_size = vocab_size * ALIGNMENT
    HAS_BONUS: tl.constexpr = entropy_bonus_ptr is not None
    sums = no_sums()
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size)
        row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        temperature_ptr = temperature_of(position, temperatures_ptr, hyper_ptr)
        row_max, sum_exp, entropy_sum = read_row(
            row_ptr, keep, vocab_size, temperature_ptr, hyper_ptr, HAS_SOFTCAP, HAS_ENTROPY, HAS_WIDE_ROWS, BLOCK_V
        )
        chosen, _ = chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP)
        log_sum_exp = tl.log(tl.where(keep, sum_exp, 1.0))
        logp = tl.where(keep, (chosen - row_max) / tl.load(temperature_ptr) - log_sum_exp, 0.0)
        tl.store(logps_ptr + position, logp)
        grad_logp = tl.full([], 0.0, tl.float32)
        grad_entropy = grad_logp
        entropy = grad_logp
        if keep:
            if sequence_ptr is None:
                sequence = position // tokens_per_sequence
            else:
                sequence = tl.load(sequence_ptr + position).to(tl.int64)
            if ADVANTAGES == "token":
                advantage = tl.load(advantages_ptr + position).to(tl.float32)
            else:
                advantage = sequence_advantage(advantages_ptr, sequence, group_size, hyper_ptr, ADVANTAGES)
            old_logp = logp
            if old_logps_ptr is not None:
                old_logp = tl.load(old_logps_ptr + position).to(tl.float32)
            rollout_weight = 1.0
            if rollout_logps_ptr is not None:
                reported = tl.load(rollout_logps_ptr + position).to(tl.float32)
                rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
            # what is loaded here occupies no register during the loops over the row
            weight = 1.0 / (tl.load(normalizer_ptr).to(tl.float32) * tl.load(hyper_ptr + MAX_COMPLETION_LENGTH))
            if lengths_ptr is not None:
                weight = weight / tl.load(lengths_ptr + sequence).to(tl.float32)
            beta = tl.load(beta_ptr).to(tl.float32)
            loss, ratio_grad, beside, penalty, ratio, low, high = token_objective(
                logp, old_logp, logp - old_logp, advantage, rollout_weight, position, keep, ref_logps_ptr, beta,
                hyper_ptr, SURROGATE, HAS_DUAL_CLIP, KL, KL_WEIGHTED,
            )  # fmt: skip
            grad_logp = weight * (ratio_grad + beside)
            loss = weight * loss
            if HAS_ENTROPY:
                entropy = log_sum_exp - entropy_sum / LOG2_E / sum_exp
            if HAS_BONUS:
                grad_entropy = -weight * tl.load(entropy_bonus_ptr).to(tl.float32)
                loss += grad_entropy * entropy
            sums = add_to_sums(sums, loss, penalty, ratio, ratio, low, high, keep, entropy)
        if grad_ptr is not None:
            residual = write_grad_logits(
                grad_ptr + row_offset(row, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNMENT),
                row_ptr, chosen_id, grad_logp, grad_entropy, entropy, row_max, sum_exp, keep, vocab_size,
                temperature_ptr, hyper_ptr, HAS_SOFTCAP, HAS_BONUS, GRAD_SHARES_MEMORY, BLOCK_V,
            )  # fmt: skip
            if residual_ptr is not None:
                tl.store(residual_ptr + row, residual)
    publish(partials_ptr, counter_ptr, totals_ptr, metrics_ptr, sums)


@kernel
def scale_kernel(
    values_ptr,  # [num_values] any float dtype, changed in place
    factor_ptr,
    num_values,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values *= factor; if the factor is 1, as for a loss that is not scaled, nothing is read."""
    num_values = tl.cast(num_values, tl.int64) * ALIGNMENT
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_range = offset < num_values
        values = tl.load(values_ptr + offset, mask=in_range, other=0.0)
        tl.store(values_ptr + offset, (values.to(tl.float32) * factor).to(values.dtype), mask=in_range)
