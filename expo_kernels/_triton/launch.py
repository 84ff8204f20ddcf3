"""The Triton backend: the arguments, grid and tile of each kernel launch.

The ops of log-probs use `TritonLogps`; `TritonLoss` adds the objective. Both keep one number per position and launch
one kernel per chunk. The functions `launch_*` pass arguments by name.

Letters: M positions of the caller's tensors, n rows of one launch, V vocabulary, B sequences, T positions of each.
"""

from typing import Any, NamedTuple, Self

import torch
import triton
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._head import Chunk, HeadCall
from expo_kernels._inputs import METRIC_NAMES, LossInputs, Tokens, make_tokens
from expo_kernels._triton import rows as row_kernels
from expo_kernels._triton import sequences as sequence_kernels
from expo_kernels.objective import Objective

# without fused multiply-adds, the same line gives equal bits in every kernel, so that old, reference and training
# log-probs agree exactly
_FP = {"enable_fp_fusion": False}


class TritonLogps:
    """Log-probs and entropies of rows, and dL/dlogits given dL/dlogps and dL/dentropies; one number per position."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.token_logps = torch.zeros(tokens.ids.numel(), dtype=torch.float32, device=tokens.ids.device)
        self.entropies: Tensor | None = None
        self.row_max: Tensor | None = None
        self.sum_exp: Tensor | None = None
        self.grad_logps: Tensor | None = None
        self.grad_entropies: Tensor | None = None

    @classmethod
    def reading(cls, call: HeadCall, *, return_entropy: bool, keeps_rows: bool) -> Self:
        """A backend for log-probs, for entropies if wanted, and for the row values that `differentiating` takes."""
        backend = cls(_logp_tokens(call))
        if return_entropy:
            backend.entropies = torch.zeros_like(backend.token_logps)
        if keeps_rows:
            backend.row_max, backend.sum_exp = (torch.zeros_like(backend.token_logps) for _ in range(2))
        return backend

    @classmethod
    def differentiating(
        cls, call: HeadCall, kept_rows: list[Tensor], grad_logps: Tensor, grad_entropies: Tensor | None
    ) -> Self:
        """A backend for dL/dlogits; `kept_rows` are entropies, row maxima and sums of exponentials."""
        backend = cls(_logp_tokens(call))
        backend.entropies, backend.row_max, backend.sum_exp = kept_rows
        backend.grad_logps = grad_logps.contiguous()
        backend.grad_entropies = None if grad_entropies is None else grad_entropies.contiguous()
        return backend

    def logps(self, chunk: Chunk) -> None:
        """Compute the log-probs of a chunk, and the row values that `grad_logits` needs."""
        launch_logps(
            chunk,
            self.tokens,
            self.token_logps,
            entropies=self.entropies,
            row_max=self.row_max,
            sum_exp=self.sum_exp,
        )

    def grad_logits(self, chunk: Chunk) -> None:
        """Write dL/dlogits of a chunk."""
        assert self.row_max is not None
        assert self.sum_exp is not None
        assert self.grad_logps is not None
        launch_grad_logits(
            chunk,
            self.tokens,
            row_max=self.row_max,
            sum_exp=self.sum_exp,
            grad_logps=self.grad_logps,
            entropies=None if self.grad_entropies is None else self.entropies,
            grad_entropies=self.grad_entropies,
        )


class TritonLoss(TritonLogps):
    """The policy loss and its metrics, without synchronisation."""

    def __init__(self, call: HeadCall, inputs: LossInputs, *, return_entropy: bool) -> None:
        super().__init__(make_tokens(inputs, call.completion_ids))
        self.needs_whole_sequences = self.tokens.needs_whole_sequences
        self._sums, self._return_entropy = make_sums(self.token_logps.device), return_entropy
        if self.needs_whole_sequences:
            self.row_max, self.sum_exp, self.grad_logps = (torch.zeros_like(self.token_logps) for _ in range(3))
            has_bonus = self.tokens.entropy_bonus is not None
            self.entropies = torch.zeros_like(self.token_logps) if return_entropy or has_bonus else None
            self.grad_entropies = torch.zeros_like(self.token_logps) if has_bonus else None

    def loss(self, chunk: Chunk) -> None:
        """Compute log-probs, loss and, if wanted, dL/dlogits of a chunk in one launch."""
        launch_row_loss(chunk, self.tokens, self._sums, self.token_logps, return_entropy=self._return_entropy)

    def sequence_loss(self, chunk: Chunk | None) -> None:
        """Compute loss and dL/dlogps of the sequences of a chunk (None: of all sequences)."""
        assert self.grad_logps is not None
        launch_sequence_loss(
            self.tokens,
            self._sums,
            self.token_logps,
            self.grad_logps,
            entropies=self.entropies,
            grad_entropies=self.grad_entropies,
            sequences=None if chunk is None else chunk.span.sequences,
        )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss 0-dim, metrics [len(METRIC_NAMES)], and the number of tokens."""
        return self._sums.result()


def loss_from_logps(logps: Tensor, inputs: LossInputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Loss, metrics and number of tokens, and dL/dlogps, shaped like `logps`."""
    flat, sums = logps.reshape(-1).contiguous(), make_sums(logps.device)
    grad_logps = torch.zeros_like(flat, dtype=torch.float32)
    launch_sequence_loss(make_tokens(inputs, None), sums, flat, grad_logps)
    return sums.result(), grad_logps.view(logps.shape)


def _logp_tokens(call: HeadCall) -> Tokens:
    """The inputs of the kernels for log-probs, which use only the objective's temperature and softcap."""
    return Tokens(
        ids=call.completion_ids.reshape(-1).contiguous(),
        mask=None if call.mask is None else (call.mask != 0).reshape(-1),
        objective=Objective(temperature=call.temperature, logit_softcap=call.logit_softcap),
    )


# --- launches


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
        row_kernels.row_logps_kernel[_row_grid(chunk)](
            logits_ptr=chunk.logits,
            logps_ptr=logps,
            entropies_ptr=entropies,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
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
) -> None:
    """Write dL/dlogits of these rows, given dL/dlogps and dL/dentropies by position."""
    with _launch.current(chunk.logits.device):
        row_kernels.row_grad_logits_kernel[_row_grid(chunk)](
            logits_ptr=chunk.logits,
            grad_ptr=chunk.grad_logits,
            residual_ptr=chunk.rounding_residual,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            **_rows(chunk, tokens, with_grad=True),
        )


def launch_row_loss(chunk: Chunk, tokens: Tokens, sums: MetricSums, logps: Tensor, *, return_entropy: bool) -> None:
    """Add the loss and metrics of these rows to `sums`; write their log-probs and, if the chunk has memory for it,
    dL/dlogits."""
    with _launch.current(chunk.logits.device):
        row_kernels.row_loss_kernel[_row_grid(chunk)](
            logits_ptr=chunk.logits,
            grad_ptr=chunk.grad_logits,
            residual_ptr=chunk.rounding_residual,
            logps_ptr=logps,
            sequence_ptr=tokens.sequence_index,
            lengths_ptr=tokens.lengths,
            HAS_ENTROPY=return_entropy or tokens.entropy_bonus is not None,
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
    sequences: range | None = None,
) -> None:
    """Add the loss and metrics of these sequences (None: of all) to `sums`; write dL/dlogps, and dL/dentropies if there
    is an entropy bonus, at their positions of [M]."""
    sequences = range(tokens.num_sequences) if sequences is None else sequences
    tile = _launch.sequence_tile()
    with _launch.current(logps.device):
        sequence_kernels.sequence_loss_kernel[_grid(logps.device, len(sequences))](
            logps_ptr=logps,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            mask_ptr=tokens.mask,
            starts_ptr=tokens.starts,
            hyper_ptr=tokens.hyper_parameters,
            first_sequence=sequences.start,
            num_sequences=len(sequences),
            MEAN_RATIO=tokens.objective.ratio == "sequence" or tokens.objective.surrogate == "gmpo",
            SEQUENCE_CORRECTION=tokens.objective.corrects_sequences,
            AVERAGES_TOKENS=tokens.objective.aggregation == "sequence",
            BLOCK_T=tile.block,
            num_warps=tile.num_warps,
            **_objective(tokens, sums),
            **_FP,
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
            **_FP,
        )


def _objective(tokens: Tokens, sums: MetricSums) -> dict[str, Any]:
    """The arguments that both loss kernels share."""
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


def _rows(chunk: Chunk, tokens: Tokens, *, with_grad: bool) -> dict[str, Any]:
    """The arguments that all kernels on rows share, with the strides of the rows and of their gradients."""
    logits = chunk.logits
    grad = logits if chunk.grad_logits is None else chunk.grad_logits
    shape, grad_shape = _shape(logits), _shape(grad)
    alignment = min(_alignment(logits), _alignment(grad)) if with_grad else _alignment(logits)
    tile = _launch.row_tile(shape.vocab_size)
    made = {
        "order_ptr": chunk.span.order,
        "mask_ptr": tokens.mask,
        "ids_ptr": tokens.ids,
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
        **_FP,
    }
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


def _alignment(logits: Tensor) -> int:
    """16 if rows start and end on multiples of 16 elements, so that every access can be 128 bits wide, else 1."""
    shape = _shape(logits)
    sizes = (shape.batch_stride, shape.row_stride, shape.vocab_size, logits.data_ptr() // logits.element_size())
    return 16 if all(size % 16 == 0 for size in sizes) else 1


def _row_grid(chunk: Chunk) -> tuple[int]:
    return _grid(chunk.logits.device, _shape(chunk.logits).num_rows)


def _grid(device: torch.device, num_rows: int) -> tuple[int]:
    return (min(num_rows, _launch.most_programs(device)),)
