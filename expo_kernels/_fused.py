"""The kernels' side of the ops: valid tokens first, logits chunk by chunk, products by the vendor's library, no sync.

What `_rows.py` and `policy_loss.py` do in PyTorch is done here by `_row_kernels.py`. How many tokens count is known to
the device alone: a stable permutation puts them first, kernels skip the rows behind them, and the host learns the
number only while the first chunk is already running, to leave out chunks that hold no token. A ratio of whole sequences
wants them whole in a chunk: of padded input the first chunk takes as many as fit at full length, and those after it as
many as fit at the lengths that the host has learnt by then.

Letters: M positions of the caller's tensors, n rows of a chunk, V vocabulary, H hidden, B sequences, T positions each.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels import _row_launchers as launchers
from expo_kernels._request import SUMS, Request
from expo_kernels.objective import Objective

# with fewer columns rounding one of them shows, and float32 products cost nothing
LEAST_NARROW_COLUMNS = 128

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Chunk(NamedTuple):
    """Some rows of logits, and where their gradient goes."""

    rows: launchers.Rows
    slopes: launchers.Slopes | None
    hidden: Tensor | None = None  # [n, H], 0 where masked


class _Source(Protocol):
    """Where rows of logits come from, and where their gradients go."""

    num_chunks: int
    """How many at most."""

    def chunks(self) -> Iterator[_Chunk]:
        """Rows of logits; each chunk may overwrite the one before."""

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[_Chunk, range]] | None:
        """Rows of logits with the sequences they are, all whole; None where that is not known to be possible."""

    def absorb(self, chunk: _Chunk, ids: Tensor) -> None:
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

    def chunks(self) -> Iterator[_Chunk]:
        yield _Chunk(launchers.Rows(self._logits), None if self._grad is None else launchers.Slopes(self._grad))

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[_Chunk, range]] | None:
        return ((chunk, range(num_sequences)) for chunk in self.chunks())

    def absorb(self, chunk: _Chunk, ids: Tensor) -> None:
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

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, self._num_rows, self._chunk_rows):
            if first > 0 and self._lengths is not None:
                lengths = self._lengths.read()
                if lengths is not None and first >= sum(lengths):
                    return
            yield self._chunk(self._order, first, min(self._chunk_rows, self._num_rows - first))

    def sequence_chunks(self, num_sequences: int) -> Iterator[tuple[_Chunk, range]] | None:
        if self.num_chunks == 1:
            return ((chunk, range(num_sequences)) for chunk in self.chunks())
        if self._tokens_per_sequence is None or not 0 < self._tokens_per_sequence <= self._most_rows:
            return None
        return self._padded_sequence_chunks(num_sequences, self._tokens_per_sequence)

    def _padded_sequence_chunks(self, num_sequences: int, length: int) -> Iterator[tuple[_Chunk, range]]:
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

    def absorb(self, chunk: _Chunk, ids: Tensor) -> None:
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

    def _chunk(self, order: Tensor | None, first: int, num_rows: int) -> _Chunk:
        """The rows at these places of `order`, or at these positions, as logits."""
        if self._buffer is None:
            # rows start on multiples of 16 elements, so that every access to them can be 128 bits wide
            stride = -(-self._vocab_size // 16) * 16
            shape = (min(self._most_rows, self._num_rows), stride)
            self._buffer = torch.empty(shape, dtype=torch.float32, device=self._hidden.device)
        logits = self._buffer[:num_rows, : self._vocab_size]
        hidden = self._take(order, slice(first, first + num_rows))
        self._write_logits(hidden, logits)
        return _Chunk(launchers.Rows(logits, order, first), self._slopes_over(logits), hidden)

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


# --- what a call says of its tokens


def make_tokens(request: Request, completion_ids: Tensor | None) -> launchers.Tokens:
    """The call as the kernels read it, without a synchronisation; `completion_ids` may be left out for log-probs."""
    mask = (request.completion_mask != 0).reshape(-1)
    device, shape = mask.device, request.completion_mask.shape
    starts, sequence_index, num_sequences = None, None, request.num_sequences
    if request.cu_seqlens is not None:
        starts = request.cu_seqlens.contiguous()
        positions = torch.arange(mask.numel(), device=device)
        sequence_index = torch.searchsorted(starts[1:].long(), positions, right=True)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).contiguous()

    advantages, meaning = flat(request.rewards), "rewards"
    if request.advantages is not None:
        advantages = flat(request.advantages)
        meaning = "sequence" if request.advantages_are_per_sequence else "token"
    objective = request.objective
    old_logps, rollout_logps = flat(request.old_logps), flat(request.rollout_logps)
    is_known = old_logps is not None and objective.ratio == "token" and objective.rollout_correction == "sequence"
    if is_known and old_logps is not None and rollout_logps is not None:
        # known before any logits: each token is given its sequence's sum of differences for its own
        differences = torch.where(mask, old_logps.float() - rollout_logps.float(), 0.0)
        rollout_logps = old_logps.float() - _sequence_sums(differences, shape, starts, sequence_index)
        objective = dataclasses.replace(objective, rollout_correction="token")
    return launchers.Tokens(
        ids=mask if completion_ids is None else completion_ids.reshape(-1).contiguous(),
        mask=mask,
        hyper=launchers.hyper_parameters(objective, device),
        objective=objective,
        num_sequences=num_sequences,
        tokens_per_sequence=max(shape[-1], 1),  # read for padded input only
        starts=starts,
        sequence_index=sequence_index,
        advantages=advantages,
        advantages_are=meaning,
        group_size=request.group_size,
        old_logps=old_logps,
        ref_logps=flat(request.ref_logps),
        rollout_logps=rollout_logps,
        lengths=_lengths(mask, shape, starts) if objective.aggregation == "sequence" else None,
        beta=_number(request.beta, device),
        normalizer=_normalizer(request, mask, num_sequences),
    )


def _sequence_sums(values: Tensor, shape: torch.Size, starts: Tensor | None, sequence_index: Tensor | None) -> Tensor:
    """Of each position [M], the sum over its sequence."""
    if starts is None or sequence_index is None:
        return values.view(shape).sum(dim=1, keepdim=True).expand(shape).reshape(-1)
    # one thread a sequence, in order: equal bits every time, which index_add_ does not promise
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=starts, unsafe=True)
    return sums[sequence_index]


def _lengths(mask: Tensor, shape: torch.Size, starts: Tensor | None) -> Tensor:
    """Valid tokens of each sequence, [B]."""
    if starts is None:
        return mask.view(shape).sum(dim=1)
    counted = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return counted[starts[1:].long()] - counted[starts[:-1].long()]


def _normalizer(request: Request, mask: Tensor, num_sequences: int) -> Tensor:
    if request.normalizer is not None:
        return _number(request.normalizer, mask.device)
    if request.objective.aggregation == "token":
        return mask.sum().clamp(min=1).float()
    return _number(float(max(num_sequences, 1)), mask.device)


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    """One float32 on the device; a Python number gets there as a kernel's argument, which waits for nothing."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


# --- the loss


@dataclass(frozen=True)
class _LossOptions:
    """What a loss says beside its rows of logits."""

    tokens: launchers.Tokens
    return_entropy: bool


def _make_source(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    wants_grad: tuple[bool, bool, bool],
    budget_mb: float | None,
    *,
    in_place: bool = False,
) -> _Source:
    if weight is None:
        return _ReadyLogits(states, wants_grad[0], in_place=in_place)
    return _Head(states, weight, bias, mask, wants_grad, budget_mb)


def _run(
    source: _Source, options: _LossOptions, wants_grad: bool, device: torch.device
) -> tuple[launchers.Sums, Tensor]:
    """Loss and metrics of all rows, and their log-probs [M]; where gradients are wanted, the source takes them in."""
    tokens, sums = options.tokens, launchers.make_sums(device)
    logps = torch.zeros(tokens.ids.numel(), dtype=torch.float32, device=device)
    if not tokens.needs_whole_sequences:
        for chunk in source.chunks():
            launchers.launch_row_loss(
                chunk.rows, tokens, sums, logps, chunk.slopes, return_entropy=options.return_entropy
            )
            if wants_grad:
                source.absorb(chunk, tokens.ids)
        return sums, logps
    tops, totals, slopes = (torch.zeros_like(logps) for _ in range(3))
    entropies = torch.zeros_like(logps) if options.return_entropy else None

    def read(chunk: _Chunk) -> None:
        launchers.launch_row_logps(chunk.rows, tokens, logps, entropies=entropies, tops=tops, sums=totals)

    def absorb(chunk: _Chunk) -> None:
        assert chunk.slopes is not None
        launchers.launch_row_slopes(chunk.rows, tokens, chunk.slopes, tops=tops, sums=totals, grad_logps=slopes)
        source.absorb(chunk, tokens.ids)

    whole = source.sequence_chunks(tokens.num_sequences) if wants_grad else None
    if whole is not None:
        for chunk, sequences in whole:
            read(chunk)
            launchers.launch_sequence_loss(tokens, sums, logps, slopes, entropies=entropies, sequences=sequences)
            absorb(chunk)
        return sums, logps
    for chunk in source.chunks():
        read(chunk)
    launchers.launch_sequence_loss(tokens, sums, logps, slopes, entropies=entropies)
    if wants_grad:
        for chunk in source.chunks():
            absorb(chunk)
    return sums, logps


def _loss_and_metrics(sums: launchers.Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Loss 0-dim, metrics [NUM_SUMS] in the order of `SUMS`, and the exact number of tokens."""
    return sums.metrics[0].clone(), sums.metrics, sums.totals[SUMS.index("tokens")].long()


def loss_of_states(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    request: Request,
    *,
    wants_grad: tuple[bool, bool, bool],
    budget_mb: float | None,
    return_entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Gradients]:
    """Loss, metrics, number of tokens, log-probs, gradients: `states` are hidden states where `weight` is given."""
    tokens = make_tokens(request, completion_ids)
    source = _make_source(states, weight, bias, tokens.mask, wants_grad, budget_mb, in_place=in_place)
    sums, logps = _run(source, _LossOptions(tokens, return_entropy), any(wants_grad), states.device)
    return *_loss_and_metrics(sums), logps.view(completion_ids.shape), source.gradients()


def loss_of_logps(logps: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, number of tokens and dL/dlogps, shaped as `logps`."""
    flat, sums = logps.reshape(-1).contiguous(), launchers.make_sums(logps.device)
    slopes = torch.zeros_like(flat, dtype=torch.float32)
    launchers.launch_sequence_loss(make_tokens(request, None), sums, flat, slopes)
    return *_loss_and_metrics(sums), slopes.view(logps.shape)


# --- log-probs and entropies


def logps_of_states(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    objective: Objective,
    budget_mb: float | None,
    return_entropy: bool,
    keeps_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and entropies at every position, the largest logit and the sum of each row.

    Of `objective`, only the temperature and the softcap act. What is not asked for is an empty tensor.
    """
    tokens = _logp_tokens(completion_ids, mask, objective)
    source = _make_source(states, weight, bias, tokens.mask, (False, False, False), budget_mb)

    def zeros(shape: torch.Size, is_asked_for: bool) -> Tensor:
        return torch.zeros(shape if is_asked_for else 0, dtype=torch.float32, device=states.device)

    logps, entropies = zeros(completion_ids.shape, True), zeros(completion_ids.shape, return_entropy)
    tops, sums = (zeros(tokens.ids.shape, keeps_rows) for _ in range(2))
    for chunk in source.chunks():
        launchers.launch_row_logps(
            chunk.rows,
            tokens,
            logps,
            entropies=entropies if return_entropy else None,
            tops=tops if keeps_rows else None,
            sums=sums if keeps_rows else None,
        )
    return logps, entropies, tops, sums


def logps_backward(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    objective: Objective,
    budget_mb: float | None,
    wants_grad: tuple[bool, bool, bool],
    kept_rows: list[Tensor],
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
) -> Gradients:
    """Gradients of states, weight and bias; `kept_rows` are what `logps_of_states` returned beside the log-probs."""
    tokens = _logp_tokens(completion_ids, mask, objective)
    entropies, tops, sums = kept_rows
    source = _make_source(states, weight, bias, tokens.mask, wants_grad, budget_mb)
    for chunk in source.chunks():
        assert chunk.slopes is not None
        launchers.launch_row_slopes(
            chunk.rows,
            tokens,
            chunk.slopes,
            tops=tops,
            sums=sums,
            grad_logps=grad_logps.contiguous(),
            entropies=None if grad_entropies is None else entropies,
            grad_entropies=None if grad_entropies is None else grad_entropies.contiguous(),
        )
        source.absorb(chunk, tokens.ids)
    return source.gradients()


def _logp_tokens(completion_ids: Tensor, mask: Tensor | None, objective: Objective) -> launchers.Tokens:
    return launchers.Tokens(
        ids=completion_ids.reshape(-1).contiguous(),
        mask=None if mask is None else (mask != 0).reshape(-1),
        hyper=launchers.hyper_parameters(objective, completion_ids.device),
        objective=objective,
    )
