"""Launchers of the row kernels: what a call looks like to them, the grid, the tile, the launch.

Letters: M positions of the caller's tensors, n rows of one launch, V vocabulary, B sequences, T positions of each.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from expo_kernels import _launch
from expo_kernels import _row_kernels as kernels
from expo_kernels._request import SUMS
from expo_kernels.objective import Objective

REWARD_SCALE_EPS = 1e-6  # `group_advantages`'s own default: what the loss divides by beside the group's std
# no fused multiply-adds: a line gives equal bits in every kernel that it is part of, so that old, reference and
# training log-probs agree exactly
_FP = {"enable_fp_fusion": False}


class Sums(NamedTuple):
    """Where the launches of one call add up loss and metrics."""

    partials: Tensor  # [most programs, NUM_SUMS] float64
    counter: Tensor  # [1] int32
    totals: Tensor  # [NUM_SUMS] float64
    metrics: Tensor  # [NUM_SUMS] float32: the loss and the metrics named by SUMS


class Rows(NamedTuple):
    """Rows of logits of one launch, and the positions they belong to."""

    logits: Tensor  # [n, V] or [B, T, V]; the last stride is 1
    order: Tensor | None = None  # [M] int64
    first_row: int = 0


class Slopes(NamedTuple):
    """Where dL/dlogits go."""

    grad: Tensor  # shaped like the logits; it may be their own memory
    residuals: Tensor | None = None  # [n] float32: what rounding took from each chosen column


@dataclass(frozen=True)
class Tokens:
    """What the objective needs of every position, all flat and on one device."""

    ids: Tensor  # [M] integers
    mask: Tensor | None  # [M] bool; None, for log-probs only: everywhere
    hyper: Tensor  # see `hyper_parameters`
    objective: Objective
    num_sequences: int = 1
    tokens_per_sequence: int = 1  # T of padded input
    starts: Tensor | None = None  # [B + 1] of packed input
    sequence_index: Tensor | None = None  # [M] of packed input
    advantages: Tensor | None = None  # [M], [B], or rewards [B]
    advantages_are: str = "sequence"  # "token", "sequence" or "rewards"
    group_size: int = 1
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rollout_logps: Tensor | None = None
    lengths: Tensor | None = None  # [B], with aggregation "sequence"
    beta: Tensor | None = None  # one number
    normalizer: Tensor | None = None  # one number
    entropy_bonus: Tensor | None = None  # one number

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of its whole sequence."""
        return self.objective.spans_sequences or self.objective.corrects_sequences

    @property
    def family(self) -> dict[str, Any]:
        """The switches that choose the code of a loss kernel."""
        return {
            "ADVANTAGES": self.advantages_are,
            "SURROGATE": self.objective.surrogate,
            "HAS_DUAL_CLIP": self.objective.dual_clip is not None,
            "KL": self.objective.kl,
            "KL_WEIGHTED": self.objective.kl_importance_weighted,
        }


@functools.lru_cache(maxsize=64)
def _hyper_parameters(objective: Objective, device: torch.device) -> tuple[Tensor, Tensor]:
    def number(value: float | None) -> float:
        return 1.0 if value is None else float(value)

    on_host = torch.tensor(
        [
            objective.temperature,
            number(objective.logit_softcap),
            1.0 - objective.clip_low,
            1.0 + objective.clip_high,
            number(objective.dual_clip),
            objective.log_ratio_clamp,
            objective.sapo_tau_pos,
            objective.sapo_tau_neg,
            objective.rollout_cap,
            REWARD_SCALE_EPS,
            number(objective.max_completion_length),
            objective.rollout_floor,
            0.0 if objective.masks_rollouts else 1.0,
            objective.vespo_k_pos,
            objective.vespo_k_neg,
            objective.vespo_lambda_pos,
            objective.vespo_lambda_neg,
        ],
        dtype=torch.float32,
        pin_memory=device.type == "cuda",
    )
    # from pinned memory the copy waits for nothing; the host side lives on with it
    return on_host.to(device, non_blocking=True), on_host


def hyper_parameters(objective: Objective, device: torch.device) -> Tensor:
    """The float32 block that kernels read every static number of an objective from."""
    return _hyper_parameters(objective, device)[0]


def make_sums(device: torch.device) -> Sums:
    """Sums of nothing yet."""
    return Sums(
        torch.empty(_launch.MOST_PROGRAMS, len(SUMS), dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(len(SUMS), dtype=torch.float64, device=device),
        torch.zeros(len(SUMS), dtype=torch.float32, device=device),
    )


def launch_row_logps(
    rows: Rows,
    tokens: Tokens,
    logps: Tensor,
    *,
    entropies: Tensor | None = None,
    tops: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write log-probs (and entropies, and what `launch_row_slopes` needs) of these rows at their positions."""
    shape = _shape(rows.logits)
    alignment = _alignment(rows.logits)
    tile = _launch.row_tile(shape.vocab_size)
    with _launch.current(rows.logits.device):
        kernels.row_logps_kernel[_grid(rows.logits.device, shape.num_rows)](
            rows.logits,
            logps,
            entropies,
            tops,
            sums,
            rows.order,
            tokens.mask,
            tokens.ids,
            tokens.hyper,
            rows.first_row,
            shape.num_rows,
            shape.rows_per_batch,
            shape.batch_stride // alignment,
            shape.row_stride // alignment,
            shape.vocab_size // alignment,
            HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
            ALIGNMENT=alignment,
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
            **_FP,
        )


def launch_row_slopes(
    rows: Rows,
    tokens: Tokens,
    slopes: Slopes,
    *,
    tops: Tensor,
    sums: Tensor,
    grad_logps: Tensor,
    entropies: Tensor | None = None,
    grad_entropies: Tensor | None = None,
) -> None:
    """Write dL/dlogits of these rows, given dL/dlogps and dL/dentropies by position."""
    shape, grad_shape = _shape(rows.logits), _shape(slopes.grad)
    alignment = min(_alignment(rows.logits), _alignment(slopes.grad))
    tile = _launch.row_tile(shape.vocab_size)
    with _launch.current(rows.logits.device):
        kernels.row_slopes_kernel[_grid(rows.logits.device, shape.num_rows)](
            rows.logits,
            slopes.grad,
            slopes.residuals,
            tops,
            sums,
            grad_logps,
            entropies,
            grad_entropies,
            rows.order,
            tokens.mask,
            tokens.ids,
            tokens.hyper,
            rows.first_row,
            shape.num_rows,
            shape.rows_per_batch,
            shape.batch_stride // alignment,
            shape.row_stride // alignment,
            grad_shape.batch_stride // alignment,
            grad_shape.row_stride // alignment,
            shape.vocab_size // alignment,
            HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
            GRAD_SHARES_MEMORY=_share_memory(rows.logits, slopes.grad),
            ALIGNMENT=alignment,
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
            **_FP,
        )


def launch_row_loss(
    rows: Rows, tokens: Tokens, sums: Sums, logps: Tensor, slopes: Slopes | None, *, return_entropy: bool
) -> None:
    """Add the loss and metrics of these rows to `sums`; write their log-probs and, with `slopes`, dL/dlogits."""
    shape = _shape(rows.logits)
    grad_shape = shape if slopes is None else _shape(slopes.grad)
    alignment = _alignment(rows.logits) if slopes is None else min(_alignment(rows.logits), _alignment(slopes.grad))
    tile = _launch.row_tile(shape.vocab_size)
    with _launch.current(rows.logits.device):
        kernels.row_loss_kernel[_grid(rows.logits.device, shape.num_rows)](
            rows.logits,
            None if slopes is None else slopes.grad,
            None if slopes is None else slopes.residuals,
            logps,
            rows.order,
            tokens.mask,
            tokens.ids,
            tokens.sequence_index,
            tokens.advantages,
            tokens.old_logps,
            tokens.ref_logps,
            tokens.rollout_logps,
            tokens.lengths,
            tokens.beta,
            tokens.normalizer,
            tokens.entropy_bonus,
            tokens.hyper,
            *sums,
            rows.first_row,
            shape.num_rows,
            shape.rows_per_batch,
            shape.batch_stride // alignment,
            shape.row_stride // alignment,
            grad_shape.batch_stride // alignment,
            grad_shape.row_stride // alignment,
            shape.vocab_size // alignment,
            tokens.tokens_per_sequence,
            tokens.group_size,
            **tokens.family,
            HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
            HAS_ENTROPY=return_entropy or tokens.entropy_bonus is not None,
            GRAD_SHARES_MEMORY=slopes is not None and _share_memory(rows.logits, slopes.grad),
            ALIGNMENT=alignment,
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
            **_FP,
        )


def launch_sequence_loss(
    tokens: Tokens,
    sums: Sums,
    logps: Tensor,
    slopes: Tensor,
    *,
    entropies: Tensor | None = None,
    entropy_slopes: Tensor | None = None,
    sequences: range | None = None,
) -> None:
    """Add the loss and metrics of these sequences, or of all, to `sums`; write dL/dlogps, and dL/dentropies where there
    is a bonus, at their positions of [M]."""
    sequences = range(tokens.num_sequences) if sequences is None else sequences
    tile = _launch.sequence_tile()
    with _launch.current(logps.device):
        kernels.sequence_loss_kernel[_grid(logps.device, len(sequences))](
            logps,
            slopes,
            entropies,
            entropy_slopes,
            tokens.mask,
            tokens.starts,
            tokens.advantages,
            tokens.old_logps,
            tokens.ref_logps,
            tokens.rollout_logps,
            tokens.beta,
            tokens.normalizer,
            tokens.entropy_bonus,
            tokens.hyper,
            *sums,
            sequences.start,
            len(sequences),
            tokens.tokens_per_sequence,
            tokens.group_size,
            **tokens.family,
            MEAN_RATIO=tokens.objective.ratio == "sequence" or tokens.objective.surrogate == "gmpo",
            SEQUENCE_CORRECTION=tokens.objective.corrects_sequences,
            AVERAGES_TOKENS=tokens.objective.aggregation == "sequence",
            BLOCK_T=tile.block,
            num_warps=tile.num_warps,
            **_FP,
        )


def launch_scale(values: Tensor, factor: Tensor) -> None:
    """values *= factor (one number on the device), in place."""
    if not values.is_contiguous():
        values.mul_(factor)
        return
    tile, count = _launch.flat_tile(), values.numel()
    alignment = 16 if count % 16 == 0 and values.data_ptr() % 16 == 0 else 1
    with _launch.current(values.device):
        kernels.scale_kernel[(triton.cdiv(count, tile.block),)](
            values,
            factor,
            count // alignment,
            ALIGNMENT=alignment,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            **_FP,
        )


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


def _alignment(logits: Tensor) -> int:
    """16 where rows start and end on multiples of 16 elements, so that every access can be 128 bits wide, else 1."""
    shape = _shape(logits)
    sizes = (shape.batch_stride, shape.row_stride, shape.vocab_size, logits.data_ptr() // logits.element_size())
    return 16 if all(size % 16 == 0 for size in sizes) else 1


def _share_memory(logits: Tensor, grad: Tensor) -> bool:
    return logits.data_ptr() == grad.data_ptr()


def _grid(device: torch.device, num_rows: int) -> tuple[int]:
    return (min(num_rows, _launch.most_programs(device)),)
