"""Rows of logits, wherever they come from, a chunk at a time: read into a float32 buffer, gradients given back.

`LogitRows` reads logits that a model made; `LinearRows` makes them from hidden states and the output head. The log
probs of every op come from `read_chunk`, so those of two ops agree bit for bit on the same inputs and chunks.

Letters: M positions of the caller's tensors, n rows of a chunk, V vocabulary, H hidden. Arithmetic is float32
(float64 where an input is).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expo_kernels import _launch, _products
from expo_kernels._vocab_group import VocabShard

ENTROPY_BLOCK = 2**18  # elements handled at once where a second [n, V] buffer would be needed


class ChunkBuffers(NamedTuple):
    """Memory that every chunk reuses."""

    logits: Tensor  # [rows, V]
    softcap_slopes: Tensor | None  # [rows, V], only with a softcap


class ChunkRead(NamedTuple):
    """What one chunk of n rows says; `probs` and `softcap_slopes` are views of the buffers."""

    logps: Tensor  # [n] of the chosen ids, nats
    columns: Tensor  # [n, 1] int64: where the chosen ids stand
    is_here: Tensor | None  # [n] bool: whether they do on this rank, of a head that is shared
    probs: Tensor  # [n, V], each row too large by the factor sums
    sums: Tensor  # [n], >= 1
    softcap_slopes: Tensor | None  # [n, V]: d capped / d raw
    entropies: Tensor | None  # [n], nats, where asked for


class RowSource(Protocol):
    """Where rows of raw logits come from, and where their gradients go."""

    vocab_size: int
    hidden_size: int  # of the products that make the logits; 0 where they are ready
    num_rows: int
    dtype: torch.dtype
    device: torch.device
    shard: VocabShard | None
    """Where the columns are those of this rank alone."""

    def write(self, rows: slice, out: Tensor, scale: float) -> None:
        """Write scale * the raw logits of `rows` to `out` [n, V]."""

    def absorb(self, rows: slice, slopes: Tensor, row_scale: Tensor) -> None:
        """Take dL/dlogits = row_scale[:, None] * slopes of `rows`; `slopes` may be overwritten."""

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the tensors it was made of; zero for rows never absorbed."""


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Positions `index` of a [M, C] or [B, T, C] tensor, [n, C]; a strided tensor is not copied whole."""
    if tensor.dim() == 2:
        return tensor.index_select(0, index)
    if tensor.is_contiguous():
        return tensor.view(-1, tensor.shape[-1]).index_select(0, index)
    return tensor[index // tensor.shape[1], index % tensor.shape[1]]


class LogitRows:
    """Rows of ready logits [M, V] or [B, T, V]; `in_place` writes their gradient over them."""

    def __init__(self, logits: Tensor, index: Tensor, dtype: torch.dtype, *, in_place: bool = False) -> None:
        self.logits, self.index, self.in_place = logits.detach(), index, in_place
        self.vocab_size, self.hidden_size, self.num_rows = logits.shape[-1], 0, index.numel()
        self.dtype, self.device = dtype, logits.device
        self.shard: VocabShard | None = None
        self._grad: Tensor | None = None

    def write(self, rows: slice, out: Tensor, scale: float) -> None:
        """Write scale * the raw logits of `rows` to `out` [n, V]."""
        out.copy_(take_rows(self.logits, self.index[rows]))
        if scale != 1.0:
            out.mul_(scale)

    def absorb(self, rows: slice, slopes: Tensor, row_scale: Tensor) -> None:
        """Take dL/dlogits = row_scale[:, None] * slopes of `rows`; `slopes` may be overwritten."""
        grad, index = self._grad_buffer(), self.index[rows]
        slopes = slopes.mul_(row_scale.unsqueeze(1)).to(grad.dtype)
        if grad.dim() == 3:
            grad[index // grad.shape[1], index % grad.shape[1]] = slopes
        else:
            grad.index_copy_(0, index, slopes)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradient of the logits; zero for rows never absorbed."""
        grad = self._grad_buffer()
        if self.in_place:
            unread = torch.ones(grad.shape[:-1].numel(), dtype=torch.bool, device=self.device)
            unread[self.index] = False
            grad.masked_fill_(unread.view(*grad.shape[:-1], 1), 0.0)
        return grad, None, None

    def _grad_buffer(self) -> Tensor:
        if self._grad is None:
            like = self.logits
            self._grad = like if self.in_place else torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return self._grad


class LinearRows:
    """Rows hidden @ weight.T + bias, never held together; gradients accumulate in the arithmetic's dtype.

    A head stored in a narrower dtype is widened some vocabulary rows at a time.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        dtype: torch.dtype,
        wants_grad: tuple[bool, bool, bool] = (False, False, False),
        shard: VocabShard | None = None,
    ) -> None:
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.index, self.wants_grad = index, wants_grad
        (self.vocab_size, self.hidden_size), self.num_rows = weight.shape, index.numel()
        self.dtype, self.device, self.shard = dtype, hidden.device, shard
        self._grad_hidden: Tensor | None = None
        self._grad_weight: Tensor | None = None
        self._grad_bias: Tensor | None = None

    def write(self, rows: slice, out: Tensor, scale: float) -> None:
        """Write scale * the raw logits of `rows` to `out` [n, V]."""
        hidden = self._chunk(rows)
        for block, weight in self._widened_blocks():
            bias = None if self.bias is None else self.bias[block]
            _products.write_logits(out[:, block], hidden, weight, bias, scale)

    def absorb(self, rows: slice, slopes: Tensor, row_scale: Tensor) -> None:
        """Take dL/dlogits = row_scale[:, None] * slopes of `rows`.

        The row scale is put on the [n, H] side of each product, which saves a pass over [n, V].
        """
        wants_hidden, wants_weight, wants_bias = self.wants_grad
        if wants_hidden:
            self._absorb_hidden(rows, slopes, row_scale)
        if wants_weight:
            scaled = self._chunk(rows) * row_scale.unsqueeze(1)
            is_first = self._grad_weight is None
            if self._grad_weight is None:
                self._grad_weight = torch.empty_like(self.weight, dtype=self.dtype)
            _products.add_to_weight(self._grad_weight, slopes, scaled, is_first=is_first)
        if wants_bias:
            if self._grad_bias is None:
                self._grad_bias = torch.zeros(self.vocab_size, dtype=self.dtype, device=self.device)
            self._grad_bias.addmv_(slopes.T, row_scale)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias (None where not wanted), not yet in the inputs' dtypes.

        Of a head that is shared, that of hidden is summed over the ranks.
        """
        given = (self.hidden, self.weight, self.bias)
        made = (self._grad_hidden, self._grad_weight, self._grad_bias)
        zeros = (
            None if tensor is None or not wanted or grad is not None else torch.zeros_like(tensor, dtype=self.dtype)
            for tensor, grad, wanted in zip(given, made, self.wants_grad, strict=True)
        )
        grad_hidden, grad_weight, grad_bias = (
            zero if grad is None else grad for grad, zero in zip(made, zeros, strict=True)
        )
        if self.shard is not None and grad_hidden is not None:
            self.shard.add_up(grad_hidden)
        return grad_hidden, grad_weight, grad_bias

    def _chunk(self, rows: slice) -> Tensor:
        return take_rows(self.hidden, self.index[rows]).to(self.dtype)

    def _absorb_hidden(self, rows: slice, slopes: Tensor, row_scale: Tensor) -> None:
        if self._grad_hidden is None:
            self._grad_hidden = torch.zeros(self.hidden.shape, dtype=self.dtype, device=self.device)
        part = torch.zeros(slopes.shape[0], self.hidden.shape[-1], dtype=self.dtype, device=self.device)
        for block, weight in self._widened_blocks():
            _products.add_to_hidden(part, slopes[:, block], weight)
        part.mul_(row_scale.unsqueeze(1))
        self._grad_hidden.view(-1, part.shape[1]).index_copy_(0, self.index[rows], part)

    def _widened_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(0, self.vocab_size), self.weight
            return
        step = _launch.widen_rows(self.weight.shape[1], self.dtype.itemsize)
        for start in range(0, self.vocab_size, step):
            block = slice(start, min(start + step, self.vocab_size))
            yield block, self.weight[block].to(self.dtype)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def chunks(source: RowSource, logit_softcap: float | None, budget_mb: float | None) -> list[slice]:
    """Slices of the source's rows whose logits fit the budget."""
    rows = _launch.chunk_rows(source.num_rows, _most_rows(source, logit_softcap, budget_mb))
    return [slice(start, min(start + rows, source.num_rows)) for start in range(0, source.num_rows, rows)]


def sequence_chunks(
    source: RowSource,
    sequence_index: Tensor,
    num_sequences: int,
    logit_softcap: float | None,
    budget_mb: float | None,
) -> list[slice] | None:
    """The same with every sequence whole, given the sequence [N] of each row; None where one exceeds the budget."""
    lengths = torch.bincount(sequence_index, minlength=num_sequences)
    parts = _launch.whole_sequences(lengths.tolist(), _most_rows(source, logit_softcap, budget_mb))
    if parts is None:
        return None
    ends = [0, *lengths.cumsum(0).tolist()]
    slices = (slice(ends[part.start], ends[part.stop]) for part in parts)
    return [rows for rows in slices if rows.stop > rows.start]


def _most_rows(source: RowSource, logit_softcap: float | None, budget_mb: float | None) -> int:
    if source.shard is not None:
        return source.shard.most_rows
    size = (source.vocab_size, source.hidden_size)
    return most_rows(*size, source.dtype, source.device, logit_softcap, budget_mb)


def most_rows(
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    logit_softcap: float | None,
    budget_mb: float | None,
) -> int:
    """Rows of a chunk of logits that are made in `dtype`."""
    return _launch.most_rows(
        vocab_size,
        itemsize=dtype.itemsize,
        buffers=1 if logit_softcap is None else 2,
        budget_mb=budget_mb,
        device=device,
        hidden_size=hidden_size,
    )


def make_buffers(source: RowSource, parts: list[slice], logit_softcap: float | None) -> ChunkBuffers:
    """Buffers for the largest of the chunks."""
    rows = max((part.stop - part.start for part in parts), default=0)
    logits = _products.empty_rows(rows, source.vocab_size, source.dtype, source.device)
    return ChunkBuffers(logits, None if logit_softcap is None else torch.empty_like(logits))


def read_chunk(
    source: RowSource,
    rows: slice,
    chosen_ids: Tensor,
    buffers: ChunkBuffers,
    temperature: float,
    logit_softcap: float | None,
    *,
    wants_entropy: bool = False,
) -> ChunkRead:
    """Log-probs of `chosen_ids` [n] in nats, and the probabilities they came from, left in the buffers."""
    n = rows.stop - rows.start
    logits, cap_slopes = buffers.logits[:n], None
    if logit_softcap is None:
        source.write(rows, logits, 1.0 / temperature)
    else:
        assert buffers.softcap_slopes is not None
        source.write(rows, logits, 1.0 / logit_softcap)
        logits.tanh_()
        cap_slopes = torch.mul(logits, logits, out=buffers.softcap_slopes[:n]).neg_().add_(1.0)
        logits.mul_(logit_softcap / temperature)
    columns, is_here, tops = chosen_ids, None, None
    if source.shard is not None:
        tops = logits.amax(dim=-1, keepdim=True)
        source.shard.take_maximum(tops)
        columns, is_here = source.shard.columns(chosen_ids)
    columns = columns.unsqueeze(1)
    chosen, sums = _exponentials(logits, columns, tops)
    probs = logits
    entropy_sums = _entropy_sums(probs) if wants_entropy else None
    if source.shard is not None:
        assert is_here is not None
        # a row's sums in one reduction; its chosen logit is on one rank alone
        parts = [torch.where(is_here, chosen, 0.0), sums]
        reduced = torch.stack(parts if entropy_sums is None else [*parts, entropy_sums])
        source.shard.add_up(reduced)
        chosen, sums = reduced[0], reduced[1]
        entropy_sums = None if entropy_sums is None else reduced[2]
    entropies = None if entropy_sums is None else entropy_sums / sums + sums.log()
    return ChunkRead(chosen - sums.log(), columns, is_here, probs, sums, cap_slopes, entropies)


def _exponentials(logits: Tensor, columns: Tensor, tops: Tensor | None) -> tuple[Tensor, Tensor]:
    """Overwrites logits [n, V] by exp(logit - top of the row); the chosen logits less the top, and each row's sum, [n].

    Some rows at once, so that a CPU's cache holds them from the first pass to the last.
    """
    chosen, sums = [], []
    num_rows = _launch.rows_in_cache(logits)
    for rows in range(0, max(logits.shape[0], 1), num_rows):
        block = slice(rows, rows + num_rows)
        part = logits[block]
        part.sub_(part.amax(dim=-1, keepdim=True) if tops is None else tops[block])
        chosen.append(part.gather(1, columns[block]).squeeze(1))
        # sum() adds pairwise; log_softmax adds a row up in sequence, 4e-5 nats off at V = 262,144
        sums.append(part.exp_().sum(dim=-1))
    return torch.cat(chosen), torch.cat(sums)


def _entropy_sums(probs: Tensor) -> Tensor:
    """Sum of -p log p over each row, [n], for any scale of p; a logit of -inf counts as probability 0."""
    step = max(1, ENTROPY_BLOCK // max(probs.shape[1], 1))
    return torch.cat([torch.special.entr(block).sum(dim=-1) for block in torch.split(probs, step)])


def absorb_logp_slopes(
    source: RowSource, rows: slice, read: ChunkRead, logp_slopes: Tensor, temperature: float
) -> None:
    """Give the source dL/dlogits, knowing dL/dlogp [n] of the chunk: dlogp/dlogits = (onehot - probs) / T."""
    slopes = read.probs
    slopes.scatter_add_(1, read.columns, _where_here(read, -read.sums))
    if read.softcap_slopes is not None:
        slopes.mul_(read.softcap_slopes)
    source.absorb(rows, slopes, -logp_slopes / (read.sums * temperature))


def _where_here(read: ChunkRead, values: Tensor) -> Tensor:
    """Values [n] of the chosen columns, [n, 1], 0 for those of other ranks."""
    return (values if read.is_here is None else torch.where(read.is_here, values, 0.0)).unsqueeze(1)


def absorb_logp_and_entropy_slopes(
    source: RowSource,
    rows: slice,
    read: ChunkRead,
    logp_slopes: Tensor,
    entropy_slopes: Tensor,
    temperature: float,
) -> None:
    """The same where L also depends on the entropies: dentropy/dlogit_j = -p_j (log p_j + entropy)."""
    assert read.entropies is not None
    entropies = read.entropies.unsqueeze(1)
    probs = read.probs.div_(read.sums.unsqueeze(1))
    step = max(1, ENTROPY_BLOCK // max(probs.shape[1], 1))
    for start in range(0, probs.shape[0], step):
        block = slice(start, start + step)
        p = probs[block]
        of_entropy = torch.xlogy(p, p).add_(p * entropies[block]).mul_(-entropy_slopes[block].unsqueeze(1))
        p.mul_(-logp_slopes[block].unsqueeze(1)).add_(of_entropy)
    probs.scatter_add_(1, read.columns, _where_here(read, logp_slopes))
    if read.softcap_slopes is not None:
        probs.mul_(read.softcap_slopes)
    source.absorb(rows, probs, torch.full_like(read.sums, 1.0 / temperature))
