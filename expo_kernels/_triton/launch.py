"""The arguments, grid and tile of each kernel launch; the functions `launch_*` pass arguments by name.

Letters: M positions of the caller's tensors, n rows of one launch, V vocabulary, B sequences, T positions of each.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._head import Chunk
from expo_kernels._inputs import METRIC_NAMES, Tokens
from expo_kernels._triton import rows as row_kernels
from expo_kernels._triton import sequences as sequence_kernels
from expo_kernels._triton import shards as shard_kernels

# without fused multiply-adds, the same line gives equal bits in every kernel, so that old, reference and training
# log-probs agree exactly
FP = {"enable_fp_fusion": False}


class MetricSums(NamedTuple):
    """Memory in which the launches of one call accumulate loss and metrics."""

    partials: Tensor  # [most programs, len(METRIC_NAMES)] float64
    counter: Tensor  # [1] int32
    totals: Tensor  # [len(METRIC_NAMES)] float64
    metrics: Tensor  # [len(METRIC_NAMES)] float32: loss and metrics

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss 0-dim, metrics, and the exact number of tokens."""
        return self.metrics[0].clone(), self.metrics, self.totals[METRIC_NAMES.index("tokens")].long()

    def pointers(self) -> dict[str, Tensor]:
        """The tensors by the names of the kernels' arguments."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


def make_sums(device: torch.device) -> MetricSums:
    """Sums before the first launch."""
    return MetricSums(
        torch.empty(_launch.MOST_PROGRAMS, len(METRIC_NAMES), dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(len(METRIC_NAMES), dtype=torch.float64, device=device),
        torch.zeros(len(METRIC_NAMES), dtype=torch.float32, device=device),
    )


def launch_logps(
    chunk: Chunk,
    tokens: Tokens,
    logps: Tensor,
    *,
    entropies: Tensor | None = None,
    row_max: Tensor | None = None,
    sum_exp: Tensor | None = None,
) -> None:
    """Write log-probs (and entropies, and the values that `launch_grad_logits` needs) of these rows by position."""
    with _launch.current(chunk.logits.device):
        row_kernels.row_logps_kernel[_row_grid(chunk, tokens)](
            logits_ptr=chunk.logits,
            logps_ptr=logps,
            entropies_ptr=entropies,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            HAS_WIDE_ROWS=_has_wide_rows(chunk),
            **_rows(chunk, tokens, with_grad=False),
        )


def launch_grad_logits(
    chunk: Chunk,
    tokens: Tokens,
    *,
    row_max: Tensor,
    sum_exp: Tensor,
    grad_logps: Tensor,
    entropies: Tensor | None = None,
    grad_entropies: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> None:
    """Write dL/dlogits of these rows, given dL/dlogps, dL/dentropies and dL/dlse by position."""
    with _launch.current(chunk.logits.device):
        row_kernels.row_grad_logits_kernel[_row_grid(chunk, tokens)](
            logits_ptr=chunk.logits,
            grad_ptr=chunk.grad_logits,
            residual_ptr=chunk.rounding_residual,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            grad_lse_ptr=grad_lse,
            IS_SHARD=tokens.ids_are_local,
            **_rows(chunk, tokens, with_grad=True),
        )


def launch_row_loss(chunk: Chunk, tokens: Tokens, sums: MetricSums, logps: Tensor, *, return_entropy: bool) -> None:
    """Add the loss and metrics of these rows to `sums`; write their log-probs and, if the chunk has memory for it,
    dL/dlogits."""
    with _launch.current(chunk.logits.device):
        row_kernels.row_loss_kernel[_row_grid(chunk, tokens)](
            logits_ptr=chunk.logits,
            grad_ptr=chunk.grad_logits,
            residual_ptr=chunk.rounding_residual,
            logps_ptr=logps,
            sequence_ptr=tokens.sequence_index,
            lengths_ptr=tokens.lengths,
            HAS_ENTROPY=return_entropy or tokens.entropy_bonus is not None,
            HAS_WIDE_ROWS=_has_wide_rows(chunk),
            **_objective(tokens, sums),
            **_rows(chunk, tokens, with_grad=True),
        )


def launch_sequence_loss(
    tokens: Tokens,
    sums: MetricSums,
    logps: Tensor,
    grad_logps: Tensor,
    *,
    entropies: Tensor | None = None,
    grad_entropies: Tensor | None = None,
    losses: Tensor | None = None,
    weights: Tensor | None = None,
    sequences: range | None = None,
) -> None:
    """Add the loss and metrics of these sequences (None: of all) to `sums`; write dL/dlogps, dL/dentropies if there is
    an entropy bonus, and the loss of each token, if wanted, at their positions of [M]. `weights` [M] of the tokens'
    losses replace those of the aggregation."""
    sequences = range(tokens.num_sequences) if sequences is None else sequences
    tile = _launch.sequence_tile()
    with _launch.current(logps.device):
        sequence_kernels.sequence_loss_kernel[_grid(logps.device, len(sequences))](
            logps_ptr=logps,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            losses_ptr=losses,
            weights_ptr=weights,
            mask_ptr=tokens.mask,
            starts_ptr=tokens.starts,
            hyper_ptr=tokens.hyper_parameters,
            first_sequence=sequences.start,
            num_sequences=len(sequences),
            MEAN_RATIO=tokens.objective.ratio != "token" or tokens.objective.surrogate == "gmpo",
            GRAD_OF_MEAN=tokens.objective.ratio != "sequence_token",
            SEQUENCE_CORRECTION=tokens.objective.corrects_sequences,
            GEOMETRIC_MASK=tokens.objective.rollout_correction == "geometric_mask",
            AVERAGES_TOKENS=tokens.objective.aggregation == "sequence",
            BLOCK_T=tile.block,
            num_warps=tile.num_warps,
            **_objective(tokens, sums),
            **FP,
        )


def launch_read_shard(chunk: Chunk, tokens: Tokens, *, has_entropy: bool) -> Tensor:
    """The numbers of these rows that the ranks of a sharded head exchange, over this rank's columns: [3 or 4, n]."""
    num_parts = 4 if has_entropy else 3
    parts = torch.empty(num_parts, _shape(chunk.logits).num_rows, dtype=torch.float32, device=chunk.logits.device)
    with _launch.current(chunk.logits.device):
        shard_kernels.read_shard_kernel[_row_grid(chunk, tokens)](
            logits_ptr=chunk.logits,
            shard_ptr=parts,
            HAS_ENTROPY=has_entropy,
            HAS_WIDE_ROWS=_has_wide_rows(chunk),
            **_rows(chunk, tokens, with_grad=False),
        )
    return parts


def launch_combine_shards(
    chunk: Chunk,
    tokens: Tokens,
    gathered: Tensor,
    logps: Tensor,
    *,
    entropies: Tensor | None = None,
    row_max: Tensor | None = None,
    sum_exp: Tensor | None = None,
) -> None:
    """Write log-probs (and entropies, and the values that `launch_grad_logits` needs) of these rows by position, from
    the numbers of all ranks, [R, 3 or 4, n]."""
    num_shards, _, num_rows = gathered.shape
    tile = _launch.token_tile()
    with _launch.current(gathered.device):
        shard_kernels.combine_shards_kernel[(triton.cdiv(num_rows, tile.block),)](
            shards_ptr=gathered,
            logps_ptr=logps,
            entropies_ptr=entropies,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            temperatures_ptr=tokens.temperatures,
            hyper_ptr=tokens.hyper_parameters,
            num_shards=num_shards,
            **token_arguments(chunk, tokens, tile),
        )


def launch_token_loss(
    chunk: Chunk,
    tokens: Tokens,
    sums: MetricSums,
    logps: Tensor,
    grad_logps: Tensor,
    *,
    entropies: Tensor | None = None,
    grad_entropies: Tensor | None = None,
) -> None:
    """Add the loss and metrics of these rows to `sums`, for a token-level objective; write dL/dlogps, and dL/dentropies
    if there is an entropy bonus, at their positions of [M]. The advantages must not be rewards."""
    tile, arguments = _launch.token_tile(), _objective(tokens, sums)
    del arguments["group_size"]
    num_blocks = triton.cdiv(chunk.rows.stop - chunk.rows.start, tile.block)
    with _launch.current(logps.device):
        shard_kernels.token_loss_kernel[_grid(logps.device, num_blocks)](
            logps_ptr=logps,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            sequence_ptr=tokens.sequence_index,
            lengths_ptr=tokens.lengths,
            hyper_ptr=tokens.hyper_parameters,
            **arguments,
            **token_arguments(chunk, tokens, tile),
        )


def launch_scale(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a 0-dim tensor on the device, in place."""
    if not values.is_contiguous():
        values.mul_(factor)
        return
    tile, count = _launch.flat_tile(), values.numel()
    alignment = 16 if count % 16 == 0 and values.data_ptr() % 16 == 0 else 1
    with _launch.current(values.device):
        row_kernels.scale_kernel[(triton.cdiv(count, tile.block),)](
            values_ptr=values,
            factor_ptr=factor,
            num_values=count // alignment,
            ALIGNMENT=alignment,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            **FP,
        )


def _objective(tokens: Tokens, sums: MetricSums) -> dict[str, Any]:
    """The arguments that all loss kernels share."""
    return {
        "advantages_ptr": tokens.advantages,
        "old_logps_ptr": tokens.old_logps,
        "ref_logps_ptr": tokens.ref_logps,
        "rollout_logps_ptr": tokens.rollout_logps,
        "beta_ptr": tokens.beta,
        "normalizer_ptr": tokens.normalizer,
        "entropy_bonus_ptr": tokens.entropy_bonus,
        "tokens_per_sequence": tokens.tokens_per_sequence,
        "group_size": tokens.group_size,
        "ADVANTAGES": tokens.advantages_are,
        "SURROGATE": tokens.objective.surrogate,
        "HAS_DUAL_CLIP": tokens.objective.dual_clip is not None,
        "KL": tokens.objective.kl,
        "KL_WEIGHTED": tokens.objective.kl_importance_weighted,
        **sums.pointers(),
    }


def token_arguments(chunk: Chunk, tokens: Tokens, tile: _launch.Tile) -> dict[str, Any]:
    """The arguments that kernels on a few numbers of each row share."""
    return {"BLOCK_N": tile.block, **chunk_arguments(chunk, tokens, tile.num_warps)}


def chunk_arguments(chunk: Chunk, tokens: Tokens, num_warps: int) -> dict[str, Any]:
    """The arguments that say which rows a chunk has."""
    return {
        "order_ptr": chunk.span.order,
        "mask_ptr": tokens.mask,
        "first_row": chunk.rows.start,
        "num_rows": chunk.rows.stop - chunk.rows.start,
        "num_warps": num_warps,
        **FP,
    }


def _rows(chunk: Chunk, tokens: Tokens, *, with_grad: bool) -> dict[str, Any]:
    """The arguments that all kernels on rows share, with the strides of the rows and of their gradients."""
    logits = chunk.logits
    grad = logits if chunk.grad_logits is None else chunk.grad_logits
    shape, grad_shape = _shape(logits), _shape(grad)
    alignment = min(alignment_of(logits), alignment_of(grad)) if with_grad else alignment_of(logits)
    tile = _launch.row_tile(shape.vocab_size, logits.itemsize)
    made = {
        "order_ptr": chunk.span.order,
        "mask_ptr": tokens.mask,
        "ids_ptr": tokens.ids,
        "temperatures_ptr": tokens.temperatures,
        "hyper_ptr": tokens.hyper_parameters,
        "first_row": chunk.rows.start,
        "num_rows": shape.num_rows,
        "rows_per_batch": shape.rows_per_batch,
        "batch_stride": shape.batch_stride // alignment,
        "row_stride": shape.row_stride // alignment,
        "vocab_size": shape.vocab_size // alignment,
        "HAS_SOFTCAP": tokens.objective.logit_softcap is not None,
        "ALIGNMENT": alignment,
        "BLOCK_V": tile.block,
        "num_warps": tile.num_warps,
        **FP,
    }
    if not _launch.is_amd():  # whose compiler has no such option
        made["maxnreg"] = _launch.most_registers(_programs(chunk, tokens))
    if with_grad:
        made["grad_batch_stride"] = grad_shape.batch_stride // alignment
        made["grad_row_stride"] = grad_shape.row_stride // alignment
        made["GRAD_SHARES_MEMORY"] = chunk.grad_logits is not None and logits.data_ptr() == grad.data_ptr()
    return made


class _Shape(NamedTuple):
    num_rows: int
    rows_per_batch: int
    batch_stride: int
    row_stride: int
    vocab_size: int


def _shape(logits: Tensor) -> _Shape:
    assert logits.stride(-1) == 1
    if logits.dim() == 2:
        return _Shape(logits.shape[0], max(logits.shape[0], 1), 0, logits.stride(0), logits.shape[1])
    num_batches, length, vocab_size = logits.shape
    return _Shape(num_batches * length, max(length, 1), logits.stride(0), logits.stride(1), vocab_size)


def alignment_of(logits: Tensor) -> int:
    """16 if rows start and end on multiples of 16 elements, so that every access can be 128 bits wide, else 1."""
    shape = _shape(logits)
    sizes = (shape.batch_stride, shape.row_stride, shape.vocab_size, logits.data_ptr() // logits.element_size())
    return 16 if all(size % 16 == 0 for size in sizes) else 1


def _has_wide_rows(chunk: Chunk) -> bool:
    """Whether rows of this length allow 128-bit loads. The order of a row's sum follows from this, so that bits depend
    on V but not on where rows start."""
    return _shape(chunk.logits).vocab_size % 16 == 0


def _programs(chunk: Chunk, tokens: Tokens) -> int:
    """Number of programs over rows that share a multiprocessor, such that their registers fit."""
    grad = chunk.grad_logits
    is_light = chunk.logits.dtype == torch.float32 and (grad is None or grad.dtype != torch.float32)
    return _launch.PROGRAMS_PER_MULTIPROCESSOR if is_light and tokens.entropy_bonus is None else 2


def _row_grid(chunk: Chunk, tokens: Tokens) -> tuple[int]:
    most = _launch.most_programs(chunk.logits.device, _programs(chunk, tokens))
    return (min(_shape(chunk.logits).num_rows, most),)


def _grid(device: torch.device, num_rows: int) -> tuple[int]:
    return (min(num_rows, _launch.most_programs(device, 2)),)
