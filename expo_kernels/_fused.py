"""The kernels' side of the ops: `_token_batch.py` and `logps.py` once more, by `_row_kernels.py` and without a sync.

Letters: M positions of the caller's tensors, V vocabulary, H hidden, B sequences, T positions each.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_kernels import _row_launchers as launchers
from expo_kernels._fused_rows import Chunk, Gradients, Source, make_source
from expo_kernels._request import SUMS, Request
from expo_kernels.objective import Objective, RolloutCorrection

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
    is_alone = objective.corrects_sequences and not objective.spans_sequences
    if is_alone and old_logps is not None and rollout_logps is not None:
        # known before any logits: each token is given its sequence's sum of differences for its own
        differences = torch.where(mask, old_logps.float() - rollout_logps.float(), 0.0)
        rollout_logps = old_logps.float() - _sequence_sums(differences, shape, starts, sequence_index)
        correction: RolloutCorrection = "token_mask" if objective.masks_rollouts else "token"
        objective = dataclasses.replace(objective, rollout_correction=correction)
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
        entropy_bonus=None if request.entropy_bonus is None else _number(request.entropy_bonus, device),
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


def _run(
    source: Source, options: _LossOptions, wants_grad: bool, device: torch.device
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
    has_bonus = tokens.entropy_bonus is not None
    entropies = torch.zeros_like(logps) if options.return_entropy or has_bonus else None
    entropy_slopes = torch.zeros_like(logps) if has_bonus else None

    def read(chunk: Chunk) -> None:
        launchers.launch_row_logps(chunk.rows, tokens, logps, entropies=entropies, tops=tops, sums=totals)

    def absorb(chunk: Chunk) -> None:
        assert chunk.slopes is not None
        launchers.launch_row_slopes(
            chunk.rows,
            tokens,
            chunk.slopes,
            tops=tops,
            sums=totals,
            grad_logps=slopes,
            entropies=entropies if has_bonus else None,
            grad_entropies=entropy_slopes,
        )
        source.absorb(chunk, tokens.ids)

    def lose(sequences: range | None = None) -> None:
        launchers.launch_sequence_loss(
            tokens, sums, logps, slopes, entropies=entropies, entropy_slopes=entropy_slopes, sequences=sequences
        )

    whole = source.sequence_chunks(tokens.num_sequences) if wants_grad else None
    if whole is not None:
        for chunk, sequences in whole:
            read(chunk)
            lose(sequences)
            absorb(chunk)
        return sums, logps
    for chunk in source.chunks():
        read(chunk)
    lose()
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
    source = make_source(states, weight, bias, tokens.mask, wants_grad, budget_mb, in_place=in_place)
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
    source = make_source(states, weight, bias, tokens.mask, (False, False, False), budget_mb)

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
    source = make_source(states, weight, bias, tokens.mask, wants_grad, budget_mb)
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
