"""Where rows of logits come from and where their gradients go: an output head; `_ready_logits.py` has the caller's own.

A chunk holds the logits of a `Span` of rows. A backend reads them and writes dL/dlogits into `grad_logits`;
`accumulate_grads` then adds the gradients of the head's inputs. A chunk is valid until the next one is made.

Letters: M positions of the caller's tensors, N rows, n of them in a chunk, V vocabulary, H hidden.
"""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from expo_kernels._kept_columns import COLUMNS_AT_ONCE, ChunkGrads, KeptColumns
from expo_kernels._narrowing import part_shapes
from expo_kernels._products import add_to_hidden, compact_rows, lazy_zeros, rows_with_gradient
from expo_kernels._vocab_group import VocabShard

# the gradients of hidden states or logits, weight and bias; each is one tensor, or its rows in several
Gradients = tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]


class HeadTensors(NamedTuple):
    """The inputs that logits are computed from: hidden states, weight [V, H] and bias [V]; or the logits themselves."""

    hidden_or_logits: Tensor  # [B, T, H] or [N, H]; [B, T, V] or [N, V]
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.hidden_or_logits.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        """float64 if any tensor is, else float32."""
        wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in self)
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class HeadCall:
    """The arguments that every op on logits has."""

    tensors: HeadTensors
    completion_ids: Tensor
    mask: Tensor | None
    temperature: float
    logit_softcap: float | None
    budget_mb: float | None
    wants_grad: tuple[bool, bool, bool] = (False, False, False)
    vocab_group: str | None = None
    inplace: bool = False
    completion_lengths: Tensor | None = None  # on the CPU: the valid tokens of each sequence, if the caller knows them
    weight_dtype: torch.dtype | None = None  # to which the weight is rounded; its gradient has the weight's own dtype
    gradient_tolerance: float = 0.0  # largest relative error of the gradients of hidden states and weight
    temperatures: Tensor | None = None  # [M]: of each position; `temperature` is then 1

    def product_tensors(self) -> HeadTensors:
        """The inputs of the products: the weight is rounded, if that is asked for."""
        weight = self.tensors.weight
        if weight is None or self.weight_dtype is None:
            return self.tensors
        return self.tensors._replace(weight=weight.detach().to(self.weight_dtype))


class Span(NamedTuple):
    """The rows of one chunk: a slice of `order`, or of the positions if there is no order."""

    rows: slice
    order: Tensor | None  # [N] int64: the position of each row
    sequences: range | None = None  # the chunk's sequences, if all of them are whole

    def positions(self, device: torch.device) -> Tensor:
        """The position of each row, [n] int64."""
        if self.order is None:
            return torch.arange(self.rows.start, self.rows.stop, device=device)
        return self.order[self.rows]


class Spans(NamedTuple):
    """The chunks of a pass."""

    most_rows: int  # of any of them
    spans: Iterable[Span]


@dataclass(slots=True, eq=False)
class Exponentials:
    """What a chunk keeps in place of float32 logits of the whole vocabulary (see `_exponentials.py`)."""

    memory: Tensor | None  # [n, V rounded up to a multiple of 16] bfloat16; None: no gradient is wanted
    logits_by_tile: Iterator[Tensor]  # [n, columns] float32, without the bias; each overwrites the one before
    vocab_size: int
    bias: Tensor | None  # [V]
    # made when the logits are read:
    tiles: Tensor | None = None  # numbers of each (tile, row)
    chosen: Tensor | None = None  # [n]: the chosen logits


@dataclass(slots=True, eq=False)
class Chunk:
    """Rows of logits, and the memory for their gradient."""

    span: Span
    logits: Tensor  # [n, V]; the caller's own logits: [N, V] or [B, T, V]
    grad_logits: Tensor | None  # dL/dlogits up to the row scale; often in the logits' own memory
    row_scale: Tensor | None = None  # [n]: dL/dlogits = row_scale[:, None] * grad_logits
    rounding_residual: Tensor | None = None  # [n]: what grad_logits lacks of the chosen column, in float32
    other_ids: Tensor | None = None  # [n] int64: another column whose gradient is not in `grad_logits`
    other_grad: Tensor | None = None  # [n]: dL/dlogit of that column
    hidden: Tensor | None = None  # [n, H], 0 where masked
    is_signed: bool = True  # whether grad_logits may be < 0 in other columns than the chosen ones
    sums_to_zero: bool = False  # whether each row of grad_logits does, but for rounding
    exponentials: Exponentials | None = None  # `logits` are then those of one tile

    @property
    def rows(self) -> slice:
        """Which rows these are."""
        return self.span.rows


class Products(Protocol):
    """The products of one head."""

    dtype: torch.dtype
    """Of logits and of summed gradients."""

    def empty_logits(self, num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
        """Memory for the logits of a chunk."""

    def grad_memory(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Memory for dL/dlogits, which overwrite the logits, and for `rounding_residual` [n] (None: not needed)."""

    def operand(self, tensor: Tensor) -> Tensor:
        """Hidden states or a bias in the dtype of the products."""

    def write_logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        """out [n, V] = scale * (hidden [n, H] @ weight [V, H].T + bias [V])."""

    def grad_operand(self, grad_logits: Tensor) -> Tensor:
        """dL/dlogits [n, V] as the next two read them, [..., V], in the same memory."""

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor) -> Tensor:
        """grad_logits [n, V] @ weight [V, H]."""

    def add_grad_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
        """total [V, H] += grad_logits [n, V].T @ hidden [n, H]; `is_first` overwrites what `total` holds."""


class Head(Protocol):
    """Where rows of logits come from, and where their gradients go."""

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """Rows of logits; each chunk may overwrite the one before."""

    def accumulate_grads(self, chunk: Chunk) -> None:
        """Accumulate the gradients from dL/dlogits of a chunk; `grad_logits` may be overwritten."""

    def gradients(self) -> Gradients:
        """Gradients of hidden states or logits, weight and bias; zero for rows without a chunk."""


class LinearHead:
    """Logits hidden @ weight.T + bias, one chunk at a time; gradients accumulate in the arithmetic's dtype."""

    def __init__(
        self,
        tensors: HeadTensors,
        completion_ids: Tensor,
        wants_grad: tuple[bool, bool, bool],
        products: Products,
        *,
        mask: Tensor | None = None,
        scale: float = 1.0,
        shard: VocabShard | None = None,
        grad_dtype: torch.dtype | None = None,
        gradient_tolerance: float = 0.0,
    ) -> None:
        """Logits are multiplied by `scale`; rows that `mask` [M] excludes are read as 0 (None: all rows are valid);
        dWeight will be rounded to `grad_dtype` (None: the weight's dtype); with a tolerance > 0, the gradient products
        leave out columns (see `_kept_columns.py`)."""
        assert tensors.weight is not None
        self._grad_weight_shapes = part_shapes(tensors.weight, grad_dtype)
        self._hidden, self._weight = tensors.hidden_or_logits.detach(), tensors.weight.detach()
        self._bias = None if tensors.bias is None else products.operand(tensors.bias.detach())
        self._completion_ids, self._mask, self._wants_grad = completion_ids, mask, wants_grad
        self._products, self._scale, self._shard = products, scale, shard
        self._tolerance, self._num_chunks = gradient_tolerance, 1
        self._kept_columns: KeptColumns | None = None
        self._error_bound = 0.0
        self._buffer: Tensor | None = None
        self._grad_hidden: Tensor | None = None
        self._grad_weight: tuple[Tensor, ...] | None = None  # its rows, in one or several tensors
        self._grad_bias: Tensor | None = None

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """Rows of logits; each chunk overwrites the one before."""
        self._num_chunks = len(spans.spans) if isinstance(spans.spans, Sized) else 1
        if self._buffer is None:
            self._buffer = self._products.empty_logits(spans.most_rows, self._weight.shape[0], self._hidden.device)
        for span in spans.spans:
            hidden = self._take(span)
            logits = self._buffer[: hidden.shape[0]]
            self._products.write_logits(logits, hidden, self._weight, self._bias, self._scale)
            chunk = Chunk(span, logits, None, hidden=hidden)
            if any(self._wants_grad):
                chunk.grad_logits, chunk.rounding_residual = self._products.grad_memory(logits)
            yield chunk

    def accumulate_grads(self, chunk: Chunk) -> None:
        """Add the gradients of a chunk to those of hidden states, weight and bias.

        The row scale is applied on the [n, H] side of each product, which saves a pass over [n, V].
        """
        grad_logits, hidden = chunk.grad_logits, chunk.hidden
        scale = chunk.row_scale
        assert grad_logits is not None
        assert hidden is not None
        wants_hidden, wants_weight, wants_bias = self._wants_grad
        positions = chunk.span.positions(grad_logits.device)
        columns = self._float32_columns(chunk, positions)
        if scale is not None and not columns:  # kernels, which have such columns, do not read the scale on the host
            rows = rows_with_gradient(scale, grad_logits.shape[1])
            if rows is not None:
                grad_logits = compact_rows(grad_logits, rows)
                hidden, scale, positions = (tensor.index_select(0, rows) for tensor in (hidden, scale, positions))
        if wants_bias:
            self._add_grad_bias(grad_logits, scale, columns)
        if self._tolerance > 0.0 and scale is not None:
            grads = ChunkGrads(grad_logits, scale, hidden, self._chosen_ids(positions), chunk.is_signed)
            if self._accumulate_kept(grads, positions, sums_to_zero=chunk.sums_to_zero):
                return
        operand = self._products.grad_operand(grad_logits) if wants_hidden or wants_weight else grad_logits
        if wants_hidden:
            part = self._products.grad_hidden(operand, self._weight)
            if scale is not None:
                part.mul_(scale.unsqueeze(1))
            for ids, grad in columns:
                part.addcmul_(self._weight[ids], grad.unsqueeze(1))
            if self._kept_columns is not None:
                self._kept_columns.record(part, len(hidden))
            self._put_grad_hidden(positions, part)
            del part  # the next products need the memory
        elif self._kept_columns is not None:
            self._kept_columns.record(None, len(hidden))
        if wants_weight:
            self._add_grad_weight(operand, hidden if scale is None else hidden * scale.unsqueeze(1))
            for ids, grad in columns:
                self._add_to_rows(ids, hidden, grad)

    def _float32_columns(self, chunk: Chunk, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Columns [n] of a chunk, and what to add to dL/dlogits [n] there, in float32."""
        made = []
        if chunk.rounding_residual is not None:
            # masked rows have a gradient and a residual of 0
            made.append((self._chosen_ids(positions), chunk.rounding_residual))
        if chunk.other_ids is not None and chunk.other_grad is not None:
            made.append((chunk.other_ids, chunk.other_grad))
        return made

    def _accumulate_kept(self, grads: ChunkGrads, positions: Tensor, *, sums_to_zero: bool) -> bool:
        """Add a chunk's gradients of hidden states and weight from the columns that matter; False, with nothing added,
        if the dense products are faster."""
        wants_hidden, wants_weight, _ = self._wants_grad
        if self._kept_columns is None:
            wants, dtype = (wants_hidden, wants_weight), self._products.dtype
            self._kept_columns = KeptColumns(self._weight, dtype, self._tolerance, wants, self._num_chunks)
        kept, scale = self._kept_columns, grads.scale
        levels, level = kept.choose(grads)
        if level is None:
            return False
        scaled_hidden, products, part = grads.hidden * scale.unsqueeze(1), torch.zeros_like(grads.hidden), None
        dropped_sums = torch.zeros_like(scale) if sums_to_zero else grads.grad_logits.sum(dim=1).mul_(scale)
        if wants_weight and self._grad_weight is None:
            self._grad_weight = self._zero_grad_weight()
        done = 0
        while level > done:
            for columns in torch.split(levels.columns(done, level), COLUMNS_AT_ONCE):
                slopes = kept.memory.columns(grads.grad_logits, columns)  # [n, k]
                if wants_hidden:
                    add_to_hidden(products, slopes, kept.memory.rows(self._weight, columns))
                    dropped_sums.sub_(slopes.sum(dim=1).mul_(scale))
                if wants_weight:
                    self._add_to_weight_rows(columns, slopes, scaled_hidden, kept)
            done = level
            if wants_hidden:
                part = (products * scale.unsqueeze(1)).addr_(dropped_sums, kept.mean_row)
                level = kept.level_for(levels, done, part)
        kept.record(part, len(scale), levels, done)
        if part is not None:
            self._put_grad_hidden(positions, part)
        return True

    def _chosen_ids(self, positions: Tensor) -> Tensor:
        """The chosen column of each row, [n] int64; any column where masked."""
        return self._completion_ids[positions].clamp(0, self._weight.shape[0] - 1).long()

    def _put_grad_hidden(self, positions: Tensor, part: Tensor) -> None:
        """Write a chunk's rows of dHidden."""
        if self._grad_hidden is None:
            # in the arithmetic's dtype until backward scales it, so that it is rounded once
            self._grad_hidden = zeros_like(self._hidden, part.dtype)
        self._grad_hidden.view(-1, part.shape[1]).index_copy_(0, positions, part)

    def _add_to_weight_rows(self, columns: Tensor, slopes: Tensor, hidden: Tensor, kept: KeptColumns) -> None:
        """Add slopes [n, k].T @ hidden [n, H] to the rows `columns` [k] of dWeight, each of which is there once."""
        assert self._grad_weight is not None
        (total,) = self._grad_weight
        # twice as fast as scatter_add_ of the product
        sums = kept.memory.sums(total, columns, kept.were_kept(columns))
        total.index_copy_(0, columns, sums.addmm_(slopes.T, hidden))

    def _zero_grad_weight(self) -> tuple[Tensor, ...]:
        shapes, dtype, device = self._grad_weight_shapes, self._products.dtype, self._weight.device
        return tuple(lazy_zeros(shape, dtype, device) for shape in shapes)

    def _add_grad_weight(self, operand: Tensor, hidden: Tensor) -> None:
        """Add a chunk's products to dWeight; the first chunk's overwrite memory that holds nothing yet."""
        is_first = self._grad_weight is None
        kind: dict[str, Any] = {"dtype": self._products.dtype, "device": operand.device}
        if self._grad_weight is None:
            self._grad_weight = tuple(torch.empty(*shape, **kind) for shape in self._grad_weight_shapes)
        start = 0
        for part in self._grad_weight:
            columns = slice(start, start + part.shape[0])
            self._products.add_grad_weight(part, operand[..., columns], hidden, is_first=is_first)
            start = columns.stop

    def _add_to_rows(self, ids: Tensor, hidden: Tensor, grad: Tensor) -> None:
        """Add grad [n] * hidden [n, H] to the rows `ids` [n] of dWeight."""
        assert self._grad_weight is not None
        start = 0
        for part in self._grad_weight:
            rows = ids - start
            is_here = (rows >= 0) & (rows < part.shape[0])
            # an id of another part adds 0; the remainder spreads these, because equal rows are added one by one
            values = hidden * grad.masked_fill(~is_here, 0.0).unsqueeze(1)
            # sorts by row first, unlike index_add_, so that every run gives equal bits
            part.index_put_((rows % part.shape[0],), values, accumulate=True)
            start += part.shape[0]

    def _add_grad_bias(self, grad_logits: Tensor, scale: Tensor | None, columns: list[tuple[Tensor, Tensor]]) -> None:
        """Add the sum of a chunk's dL/dlogits over its rows to dBias."""
        if self._grad_bias is None:
            self._grad_bias = torch.zeros(self._weight.shape[0], dtype=self._products.dtype, device=grad_logits.device)
        if scale is None:
            self._grad_bias.add_(grad_logits.sum(dim=0, dtype=torch.float32))
        else:
            self._add_scaled_rows(self._grad_bias, grad_logits, scale)
        for ids, grad in columns:
            self._grad_bias.index_put_((ids,), grad, accumulate=True)

    def _add_scaled_rows(self, grad_bias: Tensor, grad_logits: Tensor, scale: Tensor) -> None:
        """grad_bias [V] += grad_logits [n, V].T @ scale [n]."""
        grad_bias.addmv_(grad_logits.T, scale)

    def gradients(self) -> Gradients:
        """Gradients of hidden, weight and bias (None where not wanted), not yet in the inputs' dtypes.

        With a vocabulary-parallel head, the gradient of hidden is summed over the ranks.
        """
        self._buffer = None  # its memory is free for what follows
        grad_hidden, grad_weight, grad_bias = self._grad_hidden, self._grad_weight, self._grad_bias
        wants_hidden, wants_weight, wants_bias = self._wants_grad
        if wants_hidden and grad_hidden is None:
            grad_hidden = zeros_like(self._hidden, self._products.dtype)
        if wants_weight and grad_weight is None:
            grad_weight = self._zero_grad_weight()
        if wants_bias and grad_bias is None and self._bias is not None:
            grad_bias = zeros_like(self._bias, self._products.dtype)
        if self._shard is not None and grad_hidden is not None:
            self._shard.all_reduce_sum(grad_hidden)
        return (
            None if grad_hidden is None else (grad_hidden,),
            grad_weight,
            None if grad_bias is None else (grad_bias,),
        )

    def tolerance_met(self) -> bool:
        """Whether the gradients are within the tolerance; if not, they are forgotten and the next pass is exact."""
        if self._kept_columns is None:
            return True
        self._error_bound = self._kept_columns.error_bound(None if self._grad_weight is None else self._grad_weight[0])
        if self._error_bound <= self._tolerance:
            return True
        self._error_bound = 0.0
        self._grad_hidden = self._grad_weight = self._grad_bias = self._kept_columns = None
        self._tolerance = 0.0
        return False

    def gradient_report(self) -> tuple[float | Tensor, float]:
        """The bound on the gradients' relative error that `tolerance_met` found, and the share of columns in their
        products."""
        return self._error_bound, 1.0 if self._kept_columns is None else self._kept_columns.kept_share

    def _take(self, span: Span) -> Tensor:
        """Hidden states of these rows, [n, H]; 0 where masked, because masked positions may hold NaN."""
        if span.order is None:
            self._hidden = self._hidden.reshape(-1, self._hidden.shape[-1])  # a strided tensor is copied once
            hidden = self._hidden[span.rows]
            if self._mask is not None:
                hidden = hidden.masked_fill(~self._mask[span.rows].unsqueeze(1), 0.0)
            return self._products.operand(hidden)
        positions = span.order[span.rows]
        hidden = take_rows(self._hidden, positions)
        if self._mask is not None:
            hidden.masked_fill_(~self._mask[positions].unsqueeze(1), 0.0)
        return self._products.operand(hidden)


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Positions `index` of a [M, C] or [B, T, C] tensor, [n, C]; a strided tensor is not copied whole."""
    if tensor.dim() == 2:
        return tensor.index_select(0, index)
    if tensor.is_contiguous():
        return tensor.view(-1, tensor.shape[-1]).index_select(0, index)
    return tensor[index // tensor.shape[1], index % tensor.shape[1]]


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape of `tensor`, contiguous."""
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
