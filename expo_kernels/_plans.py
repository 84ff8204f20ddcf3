"""Which rows each chunk of logits holds.

Valid tokens are compacted first, so that prompt and padding tokens cost nothing. With PyTorch the host knows their
number (`HostPlan`). With Triton only the device knows the mask (`DevicePlan`): a stable permutation moves valid tokens
to the front, and kernels skip the rows behind them. The host knows the number if the caller gives the lengths; else,
with several chunks, it waits for the number after it has launched the first chunk.

Letters: M positions of the caller's tensors, N rows, B sequences, T positions of each.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from expo_kernels import _compat, _launch
from expo_kernels._head import Span, Spans


class HostPlan:
    """Chunks of rows if the host knows the number of valid tokens."""

    def __init__(self, order: Tensor, most_rows: int, sequence_index: Tensor | None = None, num_sequences: int = 0):
        """`order` [N]: positions of the valid tokens; `sequence_index` [N]: the sequence of each."""
        self._order, self._most_rows = order, most_rows
        self._sequence_index, self._num_sequences = sequence_index, num_sequences

    def spans(self) -> Spans:
        """Chunks of nearly equal size."""
        num_rows = self._order.numel()
        step = _launch.chunk_rows(num_rows, self._most_rows, _launch.row_multiple(self._order.device))
        return self._spans([slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)])

    def whole_sequences(self) -> Spans | None:
        """Chunks of as many whole sequences as fit; None if one sequence exceeds a chunk."""
        if self._order.numel() <= self._most_rows:
            return self.spans()
        assert self._sequence_index is not None
        lengths = torch.bincount(self._sequence_index, minlength=self._num_sequences)
        parts = _launch.whole_sequences(lengths.tolist(), self._most_rows)
        if parts is None:
            return None
        ends = [0, *lengths.cumsum(0).tolist()]
        slices = (slice(ends[part.start], ends[part.stop]) for part in parts)
        return self._spans([rows for rows in slices if rows.stop > rows.start])

    def _spans(self, slices: list[slice]) -> Spans:
        most_rows = max((rows.stop - rows.start for rows in slices), default=0)
        return Spans(most_rows, [Span(rows, self._order) for rows in slices])


class DevicePlan:
    """Chunks of rows if only the device knows the mask; the caller may know the lengths."""

    def __init__(
        self,
        num_rows: int,
        most_rows: int,
        num_sequences: int = 0,
        sequence_length: int | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        row_multiple: int = 1,
    ):
        """`mask` [M] moves valid tokens to the front (None: rows keep their order); `sequence_length`: T if padded;
        `lengths` [B], on the CPU: the valid tokens of each sequence (None: not known on the host)."""
        self._num_rows, self._most_rows, self._mask = num_rows, most_rows, mask
        self._num_sequences, self._sequence_length = num_sequences, sequence_length
        self._row_multiple = row_multiple
        self._order: Tensor | None = None
        self._known: list[int] | None = None
        self._copy: HostCopy | None = None
        if mask is None:
            return
        self._order = torch.sort((~mask).view(torch.uint8), stable=True).indices
        # a captured graph is replayed with other masks
        if lengths is not None and not is_captured(mask.device):
            self._known = [int(length) for length in lengths.tolist()]
            self._num_rows = sum(self._known)
            _compat.assert_on_device(mask.sum() == self._num_rows, "completion_lengths add up to another number of 1s")

    def spans(self) -> Spans:
        """Chunks of nearly equal size. If the host does not know the lengths, it waits for them before the second
        chunk: chunks without a valid token are skipped."""
        step = _launch.chunk_rows(self._num_rows, self._most_rows, self._row_multiple)
        lengths = self._arriving_lengths() if step < self._num_rows else None

        def spans() -> Iterator[Span]:
            for first in range(0, self._num_rows, step):
                if first > 0 and lengths is not None:
                    arrived = lengths.read()
                    if arrived is not None and first >= sum(arrived):
                        return
                rows = slice(first, min(first + step, self._num_rows))
                yield Span(rows, self._order, range(self._num_sequences) if step >= self._num_rows else None)

        return Spans(min(step, self._num_rows), spans())

    def whole_sequences(self) -> Spans | None:
        """As many sequences as fit at their actual lengths, if the host knows them. Else the first chunk of padded
        input takes as many as fit at full length, and the host waits for the lengths before the second; packed input
        is one chunk, or None."""
        if 0 < self._num_rows <= self._most_rows:
            return self.spans()
        if self._known is not None:
            parts = _launch.whole_sequences(self._known, self._most_rows)
            return None if parts is None else Spans(self._most_rows, self._compacted(self._known, parts))
        length = self._sequence_length
        if length is None or not 0 < length <= self._most_rows:
            return None
        return Spans(self._most_rows, self._padded_spans(length, self._arriving_lengths()))

    def _padded_spans(self, length: int, arriving: "HostCopy | None") -> Iterator[Span]:
        at_once = self._most_rows // length
        first = range(min(at_once, self._num_sequences))
        # its tokens cannot be compacted before their number is known; kernels skip masked rows
        yield Span(slice(0, len(first) * length), None, first)
        lengths = None if arriving is None or first.stop == self._num_sequences else arriving.read()
        if lengths is None:
            for start in range(at_once, self._num_sequences, at_once):
                part = range(start, min(start + at_once, self._num_sequences))
                yield Span(slice(part.start * length, part.stop * length), None, part)
            return
        rest = _launch.whole_sequences(lengths[first.stop :], self._most_rows) or ()
        yield from self._compacted(lengths, [range(part.start + first.stop, part.stop + first.stop) for part in rest])

    def _compacted(self, lengths: list[int], parts: Iterable[range]) -> Iterator[Span]:
        """A chunk of valid tokens for each of `parts`, consecutive sequences of these lengths."""
        ends = [0, *accumulate(lengths)]
        for part in parts:
            if ends[part.stop] > ends[part.start]:
                yield Span(slice(ends[part.start], ends[part.stop]), self._order, part)

    def _arriving_lengths(self) -> "HostCopy | None":
        """The lengths on their way to the host; None if it knows them or no row is masked."""
        if self._copy is None and self._known is None and self._mask is not None:
            self._copy = HostCopy(self._mask.view(-1, self._sequence_length or self._num_rows).sum(-1))
        return self._copy


class HostCopy:
    """An asynchronous copy of a few integers to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_host: Tensor | None = values
        if values.device.type == "cuda":
            self._on_host = None
            # a captured graph is replayed with other masks: kernels skip the rows that are masked
            if not is_captured(values.device):
                # the copy runs on the tensor's device, but an event records on the current one
                with _launch.current(values.device):
                    self._on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                    self._on_host.copy_(values, non_blocking=True)
                    self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    self._event.record()

    def read(self) -> list[int] | None:
        """The integers, for which the host waits; None under capture."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return None if self._on_host is None else [int(value) for value in self._on_host.tolist()]


def is_captured(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    with _launch.current(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
