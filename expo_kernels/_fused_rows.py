"""Rows of logits for the kernels, wherever they come from, chunk by chunk, and where their gradients go; no sync.

What `_rows.py` is to the PyTorch path. How many tokens count is known to the device alone: a stable permutation puts
them first, kernels skip the rows behind them, and the host learns the number only while the first chunk is already
running, to leave out chunks that hold no token. A ratio of whole sequences wants them whole in a chunk: of padded input
the first chunk takes as many as fit at full length, and those after it as many as fit at the lengths that the host has
learnt by then. Products are the vendor's library's.

Letters: M positions of the caller's tensors, n rows of a chunk, V vocabulary, H hidden.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels import _row_launchers as launchers

# with fewer columns rounding one of them shows, and float32 products cost nothing
LEAST_NARROW_COLUMNS = 128

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Chunk(NamedTuple):
    """Some rows of logits, and where their gradient goes."""

    rows: launchers.Rows
    slopes: launchers.Slopes | None
    hidden: Tensor | None = None  # [n, H], 0 where masked


class Source(Protocol):
    """Where rows of logits come from, and where their gradients go."""

    num_chunks: int
    """How many at most."""

    def chunks(self) -> Iterator[Chunk]:
        """Rows of logits; each chunk may overwrite the one before."""

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[Chunk, range]] | None:
        """Rows of logits with the sequences they are, all whole; None where that is not known to be possible."""

    def absorb(self, chunk: Chunk, ids: Tensor) -> None:
        """Take dL/dlogits, which are written."""

    def gradients(self) -> Gradients:
        """Gradients of what the source was made of."""


class _ReadyLogits:
    """Logits that a model made, all in one chunk; their gradient goes over them or beside them."""

    num_chunks = 1

    def __init__(self, logits: Tensor, wants_grad: bool, *, in_place: bool = False) -> None:
        self._logits = logits if logits.stride(-1) == 1 and logits.dim() in (2, 3) else logits.contiguous()
        self._grad: Tensor | None = None
        if wants_grad:
            is_own_memory = in_place and self._logits.data_ptr() == logits.data_ptr()
            self._grad = (
                self._logits if is_own_memory else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            )

    def chunks(self) -> Iterator[Chunk]:
        yield Chunk(launchers.Rows(self._logits), None if self._grad is None else launchers.Slopes(self._grad))

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[Chunk, range]] | None:
        return ((chunk, range(num_sequences)) for chunk in self.chunks())

    def absorb(self, chunk: Chunk, ids: Tensor) -> None:
        pass

    def gradients(self) -> Gradients:
        return self._grad, None, None


class _Head:
    """Logits made of hidden states and an output head, chunk by chunk, in float32 whatever the dtypes.

    With bfloat16 on both sides dL/dlogits are bfloat16 too, over the front of the float32 rows they come from, and the
    products read them there. The chosen column, which holds half of a row's norm or more, gets back what that rounding
    took, so that gradients stay within 2e-3. Other dtypes, and tiny vocabularies, give float32 slopes and products.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        wants_grad: tuple[bool, bool, bool],
        budget_mb: float | None,
    ) -> None:
        self._hidden = hidden.reshape(-1, hidden.shape[-1])
        self._tokens_per_sequence = hidden.shape[1] if hidden.dim() == 3 else None
        self._weight, self._bias, self._mask, self._wants_grad = weight, bias, mask, wants_grad
        self._is_half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        self._num_rows, self._vocab_size = self._hidden.shape[0], weight.shape[0]
        is_narrow = self._is_half and hidden.dtype == torch.bfloat16 and self._vocab_size >= LEAST_NARROW_COLUMNS
        self._slope_dtype = torch.bfloat16 if is_narrow else torch.float32
        self._most_rows = _launch.most_rows(
            self._vocab_size,
            hidden_size=hidden.shape[-1],
            itemsize=4,
            buffers=1,
            budget_mb=budget_mb,
            device=hidden.device,
        )
        self._chunk_rows = _launch.chunk_rows(self._num_rows, self._most_rows)
        self.num_chunks = -(-self._num_rows // self._chunk_rows)
        self._order, self._lengths = None, None
        if mask is not None:
            self._order = torch.sort((~mask).view(torch.uint8), stable=True).indices
            self._lengths = _OnHostLater(mask.view(hidden.shape[:-1]).sum(-1).view(-1))
        self._buffer: Tensor | None = None
        self._grad_hidden: Tensor | None = None
        self._grad_weight: Tensor | None = None
        self._grad_bias: Tensor | None = None
        if wants_grad[0]:
            # float32 until it is scaled by the incoming gradient, so that it is rounded once
            self._grad_hidden = torch.zeros(self._hidden.shape, dtype=torch.float32, device=hidden.device)
        if wants_grad[1]:
            self._grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        if wants_grad[2]:
            self._grad_bias = torch.zeros(self._vocab_size, dtype=torch.float32, device=weight.device)

    def chunks(self) -> Iterator[Chunk]:
        for first in range(0, self._num_rows, self._chunk_rows):
            if first > 0 and self._lengths is not None:
                lengths = self._lengths.read()
                if lengths is not None and first >= sum(lengths):
                    return
            yield self._chunk(self._order, first, min(self._chunk_rows, self._num_rows - first))

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[Chunk, range]] | None:
        if self.num_chunks == 1:
            return ((chunk, range(num_sequences)) for chunk in self.chunks())
        if self._tokens_per_sequence is None or not 0 < self._tokens_per_sequence <= self._most_rows:
            return None
        return self._padded_sequence_chunks(num_sequences, self._tokens_per_sequence)

    def _padded_sequence_chunks(self, num_sequences: int, length: int) -> Iterator[tuple[Chunk, range]]:
        at_once = self._most_rows // length
        first = range(min(at_once, num_sequences))
        # its tokens cannot be compacted before their number is known; kernels skip what is masked
        yield self._chunk(None, 0, len(first) * length), first
        lengths = None if self._lengths is None else self._lengths.read()
        if lengths is None:
            for start in range(at_once, num_sequences, at_once):
                part = range(start, min(start + at_once, num_sequences))
                yield self._chunk(None, part.start * length, len(part) * length), part
            return
        row, rest = sum(lengths[: first.stop]), lengths[first.stop :]
        for part in _launch.whole_sequences(rest, self._most_rows) or ():
            num_rows = sum(rest[part.start : part.stop])
            if num_rows > 0:
                chunk = self._chunk(self._order, row, num_rows)
                yield chunk, range(first.stop + part.start, first.stop + part.stop)
            row += num_rows

    def absorb(self, chunk: Chunk, ids: Tensor) -> None:
        rows, slopes, hidden = chunk
        assert slopes is not None
        assert hidden is not None
        positions = slice(rows.first_row, rows.first_row + hidden.shape[0])
        index = torch.arange(positions.start, positions.stop, device=ids.device)
        if rows.order is not None:
            index = rows.order[positions]
        chosen = ids[index].clamp(0, self._vocab_size - 1).long()  # rows that do not count have slope and residual 0
        if self._grad_hidden is not None:
            part = self._times_weight(slopes.grad)
            if slopes.residuals is not None:
                part.addcmul_(self._weight[chosen].float(), slopes.residuals.unsqueeze(1))
            self._grad_hidden.index_copy_(0, index, part)
        if self._grad_weight is not None:
            _add_product(self._grad_weight, slopes.grad.T, hidden.to(slopes.grad.dtype))
            if slopes.residuals is not None:
                part = hidden.float() * slopes.residuals.unsqueeze(1)
                # sorted by row first, unlike index_add_: equal bits every time
                self._grad_weight.index_put_((chosen,), part, accumulate=True)
        if self._grad_bias is not None:
            self._grad_bias.add_(slopes.grad.sum(dim=0, dtype=torch.float32))
            if slopes.residuals is not None:
                self._grad_bias.index_put_((chosen,), slopes.residuals, accumulate=True)

    def gradients(self) -> Gradients:
        return self._grad_hidden, self._grad_weight, self._grad_bias

    def _chunk(self, order: Tensor | None, first: int, num_rows: int) -> Chunk:
        """The rows at these places of `order`, or at these positions, as logits."""
        if self._buffer is None:
            # rows start on multiples of 16 elements, so that every access to them can be 128 bits wide
            stride = -(-self._vocab_size // 16) * 16
            shape = (min(self._most_rows, self._num_rows), stride)
            self._buffer = torch.empty(shape, dtype=torch.float32, device=self._hidden.device)
        logits = self._buffer[:num_rows, : self._vocab_size]
        hidden = self._take(order, slice(first, first + num_rows))
        self._write_logits(hidden, logits)
        return Chunk(launchers.Rows(logits, order, first), self._slopes_over(logits), hidden)

    def _take(self, order: Tensor | None, rows: slice) -> Tensor:
        if self._mask is None:
            return self._hidden[rows]
        # rows that do not count may hold NaN, which slopes of 0 would not stop
        if order is None:
            return self._hidden[rows].masked_fill(~self._mask[rows].unsqueeze(1), 0.0)
        index = order[rows]
        return self._hidden.index_select(0, index).masked_fill_(~self._mask[index].unsqueeze(1), 0.0)

    def _write_logits(self, hidden: Tensor, logits: Tensor) -> None:
        if self._is_half:
            _product(logits, hidden, self._weight.T)
        else:
            wide = hidden.float()
            for block, weight in self._widened():
                torch.mm(wide, weight.T, out=logits[:, block])
        if self._bias is not None:
            logits.add_(self._bias)

    def _slopes_over(self, logits: Tensor) -> launchers.Slopes | None:
        if not any(self._wants_grad):
            return None
        if self._slope_dtype == torch.float32:
            return launchers.Slopes(logits)
        assert self._buffer is not None
        front = self._buffer.view(self._slope_dtype)[: logits.shape[0], : self._vocab_size]
        return launchers.Slopes(front, torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device))

    def _times_weight(self, slopes: Tensor) -> Tensor:
        part = torch.empty(slopes.shape[0], self._hidden.shape[1], dtype=torch.float32, device=slopes.device)
        if slopes.dtype == self._weight.dtype:
            return _product(part, slopes, self._weight)
        part.zero_()
        for block, weight in self._widened():
            part.addmm_(slopes[:, block], weight)
        return part

    def _widened(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in float32, some rows at a time where it is not stored so."""
        step = self._vocab_size
        if self._weight.dtype != torch.float32:
            step = _launch.widen_rows(self._weight.shape[1], 4)
        for start in range(0, self._vocab_size, step):
            block = slice(start, min(start + step, self._vocab_size))
            yield block, self._weight[block].float()


class _OnHostLater:
    """A few integers on their way to the host while the device works on."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_host: Tensor | None = values
        if values.device.type == "cuda":
            self._on_host = None
            # a captured graph replays whatever the mask: kernels skip the rows that do not count
            if not torch.cuda.is_current_stream_capturing():
                self._on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                self._on_host.copy_(values, non_blocking=True)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record()

    def read(self) -> list[int] | None:
        """The integers; None under capture."""
        if self._event is not None:
            self._event.synchronize()
        return None if self._on_host is None else [int(value) for value in self._on_host.tolist()]


def _product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left @ right in float32, whatever the operands' common dtype."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":  # where mm has no out_dtype
        return torch.mm(left.float(), right.float(), out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right in float32, in place."""
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    if left.device.type == "cpu":
        return total.addmm_(left.float(), right.float())
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def make_source(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    wants_grad: tuple[bool, bool, bool],
    budget_mb: float | None,
    *,
    in_place: bool = False,
) -> Source:
    """Rows of `states`: hidden states where a head `weight` is given, else logits."""
    if weight is None:
        return _ReadyLogits(states, wants_grad[0], in_place=in_place)
    return _Head(states, weight, bias, mask, wants_grad, budget_mb)
