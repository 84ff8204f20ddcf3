"""Triton kernels of an output head that is sharded over the vocabulary; each rank has all rows of its own columns.

`read_shard_kernel` reads the rows of this rank's logits. Once these few numbers of each row are gathered from all
ranks, `combine_shards_kernel` adds them in rank order, so that every rank has the same bits of log-probs, and
`token_loss_kernel` computes a token-level loss from the log-probs. `row_grad_logits_kernel` then writes dL/dlogits with
the row maxima and sums of all ranks. Row and letters as in `rows.py`; R ranks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import triton
import triton.language as tl

from expo_kernels._triton.device import (
    add_to_sums,
    kernel,
    no_sums,
    publish,
    rollout_weight_of,
    token_objective,
    total,
)
from expo_kernels._triton.row import LOG2_E, LOWEST, chosen_logit, locate, read_row, row_offset, temperature_of
from expo_kernels._triton.slots import MAX_COMPLETION_LENGTH, TEMPERATURE

# the numbers of a row that the ranks exchange, in this order; the last one only if entropies are wanted
ROW_MAX = tl.constexpr(0)
SUM_EXP = tl.constexpr(1)
CHOSEN = tl.constexpr(2)  # logit of the chosen token, 0 if another rank holds its column
ENTROPY_SUM = tl.constexpr(3)


@kernel
def read_shard_kernel(
    logits_ptr,  # [n, V_r] or strided, any float dtype
    shard_ptr,  # [3 or 4, n] float32, out: the numbers of each row on this rank
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    ids_ptr,  # [M] integers: columns of this rank; outside [0, V_r) if another rank holds them
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    rows_per_batch,
    batch_stride,
    row_stride,
    vocab_size,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WIDE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Maximum, sum of exponentials, chosen logit and entropy sum of each row, over the columns of this rank."""
    vocab_size = vocab_size * ALIGNMENT
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        position, chosen_id, keep = locate(row, first_row, order_ptr, mask_ptr, ids_ptr, vocab_size, IS_SHARD=True)
        row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        temperature_ptr = temperature_of(position, temperatures_ptr, hyper_ptr)
        row_max, sum_exp, entropy_sum = read_row(
            row_ptr, keep, vocab_size, temperature_ptr, hyper_ptr, HAS_SOFTCAP, HAS_ENTROPY, HAS_WIDE_ROWS, BLOCK_V
        )
        chosen, _ = chosen_logit(row_ptr, chosen_id, keep, hyper_ptr, HAS_SOFTCAP)
        tl.store(shard_ptr + ROW_MAX * num_rows + row, row_max)
        tl.store(shard_ptr + SUM_EXP * num_rows + row, sum_exp)
        tl.store(shard_ptr + CHOSEN * num_rows + row, chosen)
        if HAS_ENTROPY:
            tl.store(shard_ptr + ENTROPY_SUM * num_rows + row, entropy_sum)


@triton.jit
def locate_rows(start, first_row, num_rows, order_ptr, mask_ptr, BLOCK_N: tl.constexpr):
    """The rows of a block, the position of each, whether it is in range, and whether it is valid."""
    row = start + tl.arange(0, BLOCK_N)
    in_range = row < num_rows
    position = (first_row + row).to(tl.int64)
    if order_ptr is not None:
        position = tl.load(order_ptr + position, mask=in_range, other=0)
    keep = tl.load(mask_ptr + position, mask=in_range, other=0) != 0
    return row, position, in_range, keep


@triton.jit
def temperatures_at(position, in_range, temperatures_ptr, hyper_ptr):
    """The temperature of each row of a block, or the objective's."""
    if temperatures_ptr is None:
        temperature = tl.load(hyper_ptr + TEMPERATURE)
    else:
        temperature = tl.load(temperatures_ptr + position, mask=in_range, other=1.0)
    return temperature


@kernel
def combine_shards_kernel(
    shards_ptr,  # [R, 3 or 4, n] float32: what `read_shard_kernel` wrote on each rank
    logps_ptr,  # [M] float32, out
    entropies_ptr,  # [M] float32, out, or None
    row_max_ptr,  # [M] float32, out, or None: as in `row_logps_kernel`, over the columns of all ranks
    sum_exp_ptr,  # [M] float32, out, or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    temperatures_ptr,  # [M] float32, or None: the objective's temperature
    hyper_ptr,
    first_row,
    num_rows,
    num_shards,
    BLOCK_N: tl.constexpr,
):
    """Log-probs of the chosen tokens, and, if wanted, entropies and the row values that the gradient needs."""
    HAS_ENTROPY: tl.constexpr = entropies_ptr is not None
    NUM_PARTS: tl.constexpr = 4 if HAS_ENTROPY else 3
    start = tl.program_id(0) * BLOCK_N
    row, position, in_range, keep = locate_rows(start, first_row, num_rows, order_ptr, mask_ptr, BLOCK_N)
    temperature = temperatures_at(position, in_range, temperatures_ptr, hyper_ptr)
    scale = LOG2_E / temperature
    row_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    for shard in range(0, num_shards):
        part_ptr = shards_ptr + shard * NUM_PARTS * num_rows + row
        row_max = tl.maximum(row_max, tl.load(part_ptr + ROW_MAX * num_rows, mask=keep, other=LOWEST))
    sum_exp = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.float32)
    entropy_sum = tl.zeros([BLOCK_N], tl.float32)
    for shard in range(0, num_shards):
        part_ptr = shards_ptr + shard * NUM_PARTS * num_rows + row
        shift = (tl.load(part_ptr + ROW_MAX * num_rows, mask=keep, other=LOWEST) - row_max) * scale
        shrink = tl.exp2(shift)
        some_exp = tl.load(part_ptr + SUM_EXP * num_rows, mask=keep, other=0.0)
        sum_exp += shrink * some_exp
        chosen += tl.load(part_ptr + CHOSEN * num_rows, mask=keep, other=0.0)  # exact: only one rank has it
        if HAS_ENTROPY:
            # the sum of e * log2(e) of a rank, after its exponentials e are multiplied by `shrink`
            some_entropy = tl.load(part_ptr + ENTROPY_SUM * num_rows, mask=keep, other=0.0)
            entropy_sum += shrink * (some_entropy + tl.where(some_exp > 0, shift * some_exp, 0.0))
    sum_exp = tl.where(keep, sum_exp, 1.0)
    log_sum_exp = tl.log(sum_exp)
    logp = (chosen - row_max) / temperature - log_sum_exp
    tl.store(logps_ptr + position, tl.where(keep, logp, 0.0), mask=in_range)
    if HAS_ENTROPY:
        entropy = log_sum_exp - entropy_sum / LOG2_E / sum_exp
        tl.store(entropies_ptr + position, tl.where(keep, entropy, 0.0), mask=in_range)
    if row_max_ptr is not None:
        tl.store(row_max_ptr + position, row_max, mask=in_range)
        tl.store(sum_exp_ptr + position, sum_exp, mask=in_range)


@kernel
def token_loss_kernel(
    logps_ptr,  # [M] float32
    grad_logps_ptr,  # [M] float32, out: dL/dlogps
    entropies_ptr,  # [M] float32 or None: added to the metrics
    grad_entropies_ptr,  # [M] float32, out: dL/dentropies, or None
    order_ptr,  # [M] int64 or None
    mask_ptr,  # [M] bool
    sequence_ptr,  # [M] integers: the sequence of each position; None: position // tokens_per_sequence
    advantages_ptr,  # [M] or [B]: see ADVANTAGES
    old_logps_ptr,  # [M] or None: on-policy
    ref_logps_ptr,  # [M] or None: no penalty
    rollout_logps_ptr,  # [M] or None: no correction
    lengths_ptr,  # [B] number of valid tokens of each sequence, or None: the loss does not average over them
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
    tokens_per_sequence,
    ADVANTAGES: tl.constexpr,  # "token" or "sequence"
    SURROGATE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The loss of some rows from their log-probs, for a token-level objective, and dL/dlogps: what `row_loss_kernel`
    does between its two passes over the logits."""
    beta = tl.load(beta_ptr).to(tl.float32)
    share = 1.0 / (tl.load(normalizer_ptr).to(tl.float32) * tl.load(hyper_ptr + MAX_COMPLETION_LENGTH))
    sums = no_sums()
    for start in range(tl.program_id(0) * BLOCK_N, num_rows, tl.num_programs(0) * BLOCK_N):
        _, position, in_range, keep = locate_rows(start, first_row, num_rows, order_ptr, mask_ptr, BLOCK_N)
        if sequence_ptr is None:
            sequence = position // tokens_per_sequence
        else:
            sequence = tl.load(sequence_ptr + position, mask=keep, other=0).to(tl.int64)
        weight = tl.where(keep, share, 0.0)
        if lengths_ptr is not None:
            weight = weight / tl.load(lengths_ptr + sequence, mask=keep, other=1).to(tl.float32)
        if ADVANTAGES == "token":
            advantage = tl.load(advantages_ptr + position, mask=keep, other=0.0).to(tl.float32)
        else:
            advantage = tl.load(advantages_ptr + sequence, mask=keep, other=0.0).to(tl.float32)
        logp = tl.load(logps_ptr + position, mask=keep, other=0.0)
        old_logp = logp
        if old_logps_ptr is not None:
            old_logp = tl.load(old_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
        rollout_weight = 1.0
        if rollout_logps_ptr is not None:
            reported = tl.load(rollout_logps_ptr + position, mask=keep, other=0.0).to(tl.float32)
            rollout_weight = rollout_weight_of(old_logp - reported, hyper_ptr)
        loss, ratio_grad, beside, penalty, ratio, low, high = token_objective(
            logp, old_logp, logp - old_logp, advantage, rollout_weight, position, keep, ref_logps_ptr, beta,
            hyper_ptr, SURROGATE, HAS_DUAL_CLIP, KL, KL_WEIGHTED,
        )  # fmt: skip
        tl.store(grad_logps_ptr + position, weight * (ratio_grad + beside), mask=in_range)
        loss = weight * loss
        entropy_total = tl.full([], 0.0, tl.float64)
        if entropies_ptr is not None:
            entropy = tl.load(entropies_ptr + position, mask=keep, other=0.0)
            entropy_total = total(entropy, keep)
            if entropy_bonus_ptr is not None:
                grad_entropy = -weight * tl.load(entropy_bonus_ptr).to(tl.float32)
                loss += grad_entropy * entropy
                tl.store(grad_entropies_ptr + position, grad_entropy, mask=in_range)
        sums = add_to_sums(
            sums, total(loss, keep), total(penalty, keep), total(ratio, keep),
            tl.max(tl.where(keep, ratio, 0.0), axis=0), total(low.to(tl.float32), keep),
            total(high.to(tl.float32), keep), total(keep.to(tl.float32), keep), entropy_total,
        )  # fmt: skip
    publish(partials_ptr, counter_ptr, totals_ptr, metrics_ptr, sums)
