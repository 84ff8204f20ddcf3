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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _launch
from expo_kernels import _row_launchers as launchers
from expo_kernels._request import Request
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
            self._grad = self._logits if is_own_memory else torch.empty_like(self._logits)

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
    """All of a loss that is not differentiated."""

    tokens: launchers.Tokens
    budget_mb: float | None
    return_entropy: bool
    in_place: bool
    grad_enabled: bool  # inside a Function's forward it always reads False


class _FusedLoss(torch.autograd.Function):
    """States (logits, or hidden with weight and bias) -> loss, metrics, log-probs [M]; gradients made at once."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None, options: _LossOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad = tuple(needed and options.grad_enabled for needed in ctx.needs_input_grad[:3])
        source = _make_source(
            states, weight, bias, options.tokens.mask, wants_grad, options.budget_mb, in_place=options.in_place
        )
        sums, logps = _run(source, options, any(wants_grad), states.device)
        metrics = _metrics(sums)
        ctx.mark_non_differentiable(metrics, logps)
        if any(wants_grad):
            ctx.save_for_backward(*source.gradients())
            ctx.like = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in (states, weight, bias)]
        return sums.metrics[0].clone(), metrics, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else _scaled(gradient, grad_loss).view(like[0]).to(like[1])
            for gradient, like in zip(ctx.saved_tensors, ctx.like, strict=True)
        )
        return *scaled, None


def _make_source(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    wants_grad: tuple[bool, ...],
    budget_mb: float | None,
    *,
    in_place: bool = False,
) -> _Source:
    if weight is None:
        return _ReadyLogits(states, wants_grad[0], in_place=in_place)
    of_hidden, of_weight, of_bias = wants_grad
    return _Head(states, weight, bias, mask, (of_hidden, of_weight, of_bias), budget_mb)


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


def _metrics(sums: launchers.Sums) -> Tensor:
    """Means as `launchers.SUMS` names them, [NUM_SUMS] float64: wide enough for any number of tokens."""
    metrics = sums.metrics.double()
    metrics[launchers.SUMS.index("tokens")] = sums.totals[launchers.SUMS.index("tokens")]
    return metrics


def _scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """grad_loss * gradient, in place unless a second backward may come for the same numbers."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    launchers.launch_scale(gradient, grad_loss)
    return gradient


def loss_of_states(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    request: Request,
    *,
    budget_mb: float | None,
    return_entropy: bool,
    in_place: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and log-probs: `states` are hidden states where a head `weight` is given, else logits."""
    tokens = make_tokens(request, completion_ids)
    options = _LossOptions(tokens, budget_mb, return_entropy, in_place, torch.is_grad_enabled())
    with torch.autocast(states.device.type, enabled=False):
        loss, metrics, logps = _FusedLoss.apply(states, weight, bias, options)  # type: ignore[no-untyped-call]
    return loss, _named(metrics, return_entropy), logps.view(completion_ids.shape)


def _named(metrics: Tensor, return_entropy: bool) -> dict[str, Tensor]:
    left_out = {"loss"} if return_entropy else {"loss", "entropy"}
    named = {name: value for name, value in zip(launchers.SUMS, metrics.unbind(), strict=True) if name not in left_out}
    return {name: value.long() if name == "tokens" else value.float() for name, value in named.items()}


class _FusedLossOfLogps(torch.autograd.Function):
    """Log-probs -> loss, metrics; dL/dlogps made at once."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, tokens: launchers.Tokens) -> tuple[Tensor, Tensor]:
        flat, sums = logps.reshape(-1).contiguous(), launchers.make_sums(logps.device)
        slopes = torch.zeros_like(flat, dtype=torch.float32)
        launchers.launch_sequence_loss(tokens, sums, flat, slopes)
        metrics = _metrics(sums)
        ctx.mark_non_differentiable(metrics)
        ctx.save_for_backward(slopes)
        ctx.like = (logps.shape, logps.dtype)
        return sums.metrics[0].clone(), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return (slopes * grad_loss).view(shape).to(dtype), None


def loss_of_logps(logps: Tensor, request: Request) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and the log-probs of the tokens that count."""
    tokens = make_tokens(request, None)
    loss, metrics = _FusedLossOfLogps.apply(logps, tokens)  # type: ignore[no-untyped-call]
    kept = logps.detach().float().masked_fill(request.completion_mask == 0, 0.0)
    return loss, _named(metrics, return_entropy=False), kept


# --- log-probs and entropies


@dataclass(frozen=True)
class _LogpOptions:
    """All of a log-prob call that is not differentiated."""

    tokens: launchers.Tokens
    budget_mb: float | None
    return_entropy: bool
    keeps_rows: bool  # what a gradient will need


class _FusedLogps(torch.autograd.Function):
    """States (logits, or hidden with weight and bias) -> log-probs [M] and entropies [M]."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None, options: _LogpOptions
    ) -> tuple[Tensor, Tensor]:
        tokens = options.tokens
        source = _make_source(states, weight, bias, tokens.mask, (False, False, False), options.budget_mb)
        logps, entropies, tops, sums = (
            torch.zeros(tokens.ids.numel(), dtype=torch.float32, device=states.device) for _ in range(4)
        )
        for chunk in source.chunks():
            launchers.launch_row_logps(
                chunk.rows,
                tokens,
                logps,
                entropies=entropies if options.return_entropy else None,
                tops=tops if options.keeps_rows else None,
                sums=sums if options.keeps_rows else None,
            )
        ctx.save_for_backward(states, weight, bias, entropies, tops, sums)
        ctx.options = options
        if not options.return_entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, entropies, tops, sums = ctx.saved_tensors
        options: _LogpOptions = ctx.options
        tokens = options.tokens
        source = _make_source(states, weight, bias, tokens.mask, ctx.needs_input_grad[:3], options.budget_mb)
        with torch.autocast(states.device.type, enabled=False):
            for chunk in source.chunks():
                assert chunk.slopes is not None
                launchers.launch_row_slopes(
                    chunk.rows,
                    tokens,
                    chunk.slopes,
                    tops=tops,
                    sums=sums,
                    grad_logps=grad_logps.contiguous(),
                    entropies=entropies if options.return_entropy else None,
                    grad_entropies=grad_entropies.contiguous() if options.return_entropy else None,
                )
                source.absorb(chunk, tokens.ids)
        gradients = (
            None if gradient is None else gradient.view(tensor.shape).to(tensor.dtype)
            for gradient, tensor in zip(source.gradients(), (states, weight, bias), strict=True)
        )
        return *gradients, None


def logps_of_states(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    objective: Objective,
    *,
    return_entropy: bool,
    budget_mb: float | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies at every position; of `objective`, only the temperature and the softcap act."""
    tokens = launchers.Tokens(
        ids=completion_ids.reshape(-1).contiguous(),
        mask=None if mask is None else (mask != 0).reshape(-1),
        hyper=launchers.hyper_parameters(objective, states.device),
        objective=objective,
    )
    keeps_rows = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (states, weight, bias)
    )
    options = _LogpOptions(tokens, budget_mb, return_entropy, keeps_rows)
    with torch.autocast(states.device.type, enabled=False):
        logps, entropies = _FusedLogps.apply(states, weight, bias, options)  # type: ignore[no-untyped-call]
    return logps.view(completion_ids.shape), entropies.view(completion_ids.shape)
