"""The policy loss: EXPO's (and GRPO's) objective on logits or on log-probs, and its gradient.

Source: FG-ExPO (arXiv 2605.11403), eq. 1 to 3 and algorithm 1, written out in `reference.py`. The gradient of a token
depends on the other tokens only through constants known beforehand (masks, lengths, the normalizer), so each chunk of
logits is read once: log-probs, then dL/dlogp by differentiating the formula on those few numbers, then dL/dlogits in
the chunk's own memory. For a ratio of whole sequences chunks hold whole sequences; where one exceeds a chunk, a pass
for the log-probs comes first.

Letters: B sequences, T completion positions, N valid tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from expo_kernels import _launch, _rows, logps, reference
from expo_kernels import _validate as validate
from expo_kernels._request import Request, check_request
from expo_kernels.advantages import group_advantages
from expo_kernels.objective import Objective


class LossOutput(NamedTuple):
    """What a loss call returns."""

    loss: Tensor
    """0-dim: call .backward() on it."""

    metrics: dict[str, Tensor]
    """0-dim tensors on the device, detached; means over valid tokens (0 where there are none):
    `kl` nats of the chosen estimator, importance weight included where it is on; 0 without `ref_logps`;
    `ratio_mean`, `ratio_max` of pi_theta / pi_old, of the token or of its sequence;
    `clip_low_fraction`, `clip_high_fraction` share of valid tokens for which the surrogate's lower or upper clipped
    term was chosen (the dual clip's cap counts as upper; always 0 for "sapo");
    `tokens` number of valid tokens; `entropy` nats, only with `return_entropy`."""

    logps: Tensor
    """Log-probs in nats, shaped like `completion_mask`, float32, detached, 0 where masked."""


@dataclass(frozen=True)
class TokenBatch:
    """The N valid tokens of a call and all that the objective needs of each, with no gradient through any of it."""

    index: Tensor  # [N] int64: flat positions
    sequence_index: Tensor  # [N] int64: the sequence of each
    num_sequences: int
    advantages: Tensor  # [N]
    old_logps: Tensor | None  # [N]
    ref_logps: Tensor | None  # [N]
    rollout_logps: Tensor | None  # [N], only where the correction depends on the current log-probs
    corrections: Tensor | None  # [N], where it does not
    weights: Tensor  # [N]: share of each token's loss in the whole
    beta: Tensor  # 0-dim
    objective: Objective

    def rows(self, rows: slice) -> Self:
        """The tokens of one chunk."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return type(self)(
            self.index[rows],
            self.sequence_index[rows],
            self.num_sequences,
            self.advantages[rows],
            part(self.old_logps),
            part(self.ref_logps),
            part(self.rollout_logps),
            part(self.corrections),
            self.weights[rows],
            self.beta,
            self.objective,
        )

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of its whole sequence."""
        corrects_sequences = self.objective.rollout_correction == "sequence" and self.corrections is None
        return self.objective.ratio == "sequence" or corrects_sequences

    def terms(self, logps: Tensor) -> reference.TokenTerms:
        """The objective's terms of each token, given its log-prob."""
        return reference.token_terms(
            logps,
            old_logps=self.old_logps,
            ref_logps=self.ref_logps,
            rollout_logps=self.rollout_logps,
            corrections=self.corrections,
            advantages=self.advantages,
            beta=self.beta,
            sequence_index=self.sequence_index,
            num_sequences=self.num_sequences,
            objective=self.objective,
        )

    def loss(self, logps: Tensor) -> Tensor:
        """The whole loss, 0-dim."""
        return (self.terms(logps).losses * self.weights).sum()

    def logp_slopes(self, logps: Tensor) -> Tensor:
        """dL/dlogp of each token, [N]."""
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.loss(leaf), leaf)
        return slopes

    def metrics(self, logps: Tensor) -> dict[str, Tensor]:
        """See `LossOutput.metrics`."""
        with torch.no_grad():
            terms = self.terms(logps)
            count = max(logps.numel(), 1)
            # a ratio is > 0, so the 0 shows only where there is no token
            ratios = torch.cat([terms.ratios, terms.ratios.new_zeros(1)])
            return {
                "kl": terms.penalties.sum() / count,
                "ratio_mean": terms.ratios.sum() / count,
                "ratio_max": ratios.max(),
                "clip_low_fraction": terms.clipped_low.to(logps.dtype).sum() / count,
                "clip_high_fraction": terms.clipped_high.to(logps.dtype).sum() / count,
                "tokens": torch.full((), logps.numel(), dtype=torch.int64, device=logps.device),
            }


@dataclass(frozen=True)
class _Options:
    """All that is not differentiated."""

    chosen_ids: Tensor  # [N] int64
    tokens: TokenBatch
    budget_mb: float | None
    return_entropy: bool
    in_place: bool
    grad_enabled: bool  # inside a Function's forward it always reads False


class _PolicyLoss(torch.autograd.Function):
    """States (logits, or hidden with weight and bias) -> loss, log-probs [N], entropies [N]; gradients made at once."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_states, of_weight, of_bias, _ = ctx.needs_input_grad
        wants_grad = (of_states, of_weight, of_bias) if options.grad_enabled else (False, False, False)
        source = logps.make_source(states, weight, bias, options.tokens.index, wants_grad, in_place=options.in_place)
        token_logps, entropies = _run_chunks(source, options, any(wants_grad))
        loss = options.tokens.loss(token_logps)
        ctx.mark_non_differentiable(token_logps, entropies)
        if any(wants_grad):
            ctx.save_for_backward(*source.gradients())
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (states, weight, bias)]
        return loss, token_logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(_scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs), None


def _run_chunks(source: _rows.RowSource, options: _Options, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of all rows; where gradients are wanted, the source takes them in."""
    tokens, softcap = options.tokens, options.tokens.objective.logit_softcap
    temperature = tokens.objective.temperature
    parts, reads_twice = _rows.chunks(source, softcap, options.budget_mb), False
    if wants_grad and tokens.needs_whole_sequences and len(parts) > 1:
        whole = _rows.sequence_chunks(source, tokens.sequence_index, tokens.num_sequences, softcap, options.budget_mb)
        parts, reads_twice = whole or parts, whole is None
    buffers = _rows.make_buffers(source, parts, softcap)
    token_logps = torch.empty(source.num_rows, dtype=source.dtype, device=source.device)
    entropies = torch.zeros_like(token_logps)
    for rows in parts:
        ids = options.chosen_ids[rows]
        read = _rows.read_chunk(source, rows, ids, buffers, temperature, softcap)
        token_logps[rows] = read.logps
        if options.return_entropy:
            entropies[rows] = _rows.chunk_entropies(read)
        if wants_grad and not reads_twice:
            slopes = tokens.rows(rows).logp_slopes(read.logps)
            _rows.absorb_logp_slopes(source, rows, ids, read, slopes, temperature)
    if reads_twice:
        slopes = tokens.logp_slopes(token_logps)
        for rows in parts:
            ids = options.chosen_ids[rows]
            read = _rows.read_chunk(source, rows, ids, buffers, temperature, softcap)
            _rows.absorb_logp_slopes(source, rows, ids, read, slopes[rows], temperature)
    return token_logps, entropies


def _scaled(gradient: Tensor | None, grad_loss: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """grad_loss * gradient in the input's dtype; without a copy where nothing can tell."""
    if gradient is None or dtype is None:
        return None
    # reading the number is free on CPU and saves a pass over [V, H]
    if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        return gradient.to(dtype)
    # in place unless a second backward may come for the same numbers
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * grad_loss).to(dtype)
    return gradient.mul_(grad_loss).to(dtype)


def expo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    beta: float | Tensor = 0.02,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
) -> LossOutput:
    """Policy loss of a batch from its logits: 0-dim loss, metrics and log-probs; differentiable in `logits`.

    Source: FG-ExPO (arXiv 2605.11403) eq. 1 to 3; `objective` chooses among the variants. Masked positions may hold
    anything in any tensor and change nothing.

    Args:
        logits: [B, T, V], or packed [N, V], any float dtype; row t predicts `completion_ids[:, t]`. Not yet divided by
            the temperature.
        completion_ids: [B, T] or [N] integers in [0, V) wherever the mask is 1.
        completion_mask: [B, T] or [N], bool or 0/1: where the token counts.
        advantages: [B], [B, T], or packed [B] or [N] (with B = N it is read per sequence).
        rewards: [B] floats instead of `advantages`, with `group_size`: see `group_advantages`.
        group_size: G, rollouts per question, adjacent.
        old_logps: like the mask, nats, under the policy that the ratio compares with; None: on-policy, ratio exactly 1
            with a gradient.
        ref_logps: like the mask, nats, under the frozen reference; None only with beta = 0.
        rollout_logps: like the mask, nats, as the sampler reported them; goes with `objective.rollout_correction`.
        beta: >= 0, weight of the KL penalty; a 0-dim tensor is read on its device.
        objective: everything static; None: `Objective()`.
        normalizer: > 0, the denominator over all micro-batches and ranks: sequences (tokens for aggregation "token");
            None: counted from this call.
        cu_seqlens: [B + 1] int32, where each packed sequence starts and ends; only and always with packed input.
        return_entropy: also compute `metrics["entropy"]`.
        inplace: write the gradient over `logits`, which then hold it instead of logits.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: shapes that do not fit, values out of range, options that contradict each other.
        TypeError: an argument of the wrong type or dtype.
    """
    validate.floating("logits", logits)
    validate.dimensions("logits", logits, "BTV" if cu_seqlens is None else "NV")
    logps.check_ids_and_mask("logits", logits, completion_ids, "completion_mask", completion_mask)
    request = check_request(
        completion_mask,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        beta=beta,
        objective=objective,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    return loss_of_states(logits, None, None, completion_ids, request, return_entropy=return_entropy, in_place=inplace)


def expo_loss_from_logps(
    logps: Tensor,
    completion_mask: Tensor,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    beta: float | Tensor = 0.02,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """Policy loss of a batch from log-probs the caller made: differentiable in `logps`.

    Args:
        logps: [B, T], or packed [N], nats, already at `objective.temperature`.
        completion_mask: like `logps`, bool or 0/1: where the token counts.
        advantages: the rest as `expo_loss`.
        rewards: as `expo_loss`.
        group_size: as `expo_loss`.
        old_logps: as `expo_loss`.
        ref_logps: as `expo_loss`.
        rollout_logps: as `expo_loss`.
        beta: as `expo_loss`.
        objective: as `expo_loss`; its temperature and logit_softcap have already acted.
        normalizer: as `expo_loss`.
        cu_seqlens: as `expo_loss`.

    Returns:
        `LossOutput`, without an entropy.

    Raises:
        ValueError: shapes that do not fit, values out of range, options that contradict each other.
        TypeError: an argument of the wrong type or dtype.
    """
    validate.floating("logps", logps)
    validate.dimensions("logps", logps, "BT" if cu_seqlens is None else "N")
    validate.mask_values("completion_mask", completion_mask)
    validate.same_shape("completion_mask", completion_mask, "logps", logps.shape)
    validate.same_device(logps=logps, completion_mask=completion_mask)
    request = check_request(
        completion_mask,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        beta=beta,
        objective=objective,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    if _launch.use_kernels(logps):
        from expo_kernels import _fused

        return LossOutput(*_fused.loss_of_logps(logps, request))
    tokens = gather_tokens(request, _rows.arithmetic_dtype(logps))
    token_logps = logps.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype)
    return loss_output(tokens.loss(token_logps), token_logps.detach(), None, tokens, logps.shape)


def loss_of_states(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    request: Request,
    *,
    budget_mb: float | None = None,
    return_entropy: bool = False,
    in_place: bool = False,
) -> LossOutput:
    """Loss of validated arguments: `states` are hidden states where a head `weight` is given, else logits."""
    if _launch.use_kernels(states, weight, bias):
        from expo_kernels import _fused

        made = _fused.loss_of_states(
            states,
            weight,
            bias,
            completion_ids,
            request,
            budget_mb=budget_mb,
            return_entropy=return_entropy,
            in_place=in_place,
        )
        return LossOutput(*made)
    tokens = gather_tokens(request, _rows.arithmetic_dtype(states, weight, bias))
    chosen_ids = completion_ids.reshape(-1).index_select(0, tokens.index).long()
    size, size_name = (states.shape[-1], "V of logits") if weight is None else (weight.shape[0], "V of weight")
    validate.ids_in_range("completion_ids", chosen_ids, size, size_name)
    options = _Options(chosen_ids, tokens, budget_mb, return_entropy, in_place, torch.is_grad_enabled())
    with torch.autocast(states.device.type, enabled=False):
        made = _PolicyLoss.apply(states, weight, bias, options)  # type: ignore[no-untyped-call]
    loss, token_logps, entropies = cast("tuple[Tensor, Tensor, Tensor]", made)
    return loss_output(loss, token_logps, entropies if return_entropy else None, tokens, completion_ids.shape)


def loss_output(
    loss: Tensor, token_logps: Tensor, entropies: Tensor | None, tokens: TokenBatch, shape: torch.Size
) -> LossOutput:
    """The loss with its metrics and log-probs at their positions."""
    metrics = tokens.metrics(token_logps)
    if entropies is not None:
        metrics["entropy"] = entropies.sum() / max(entropies.numel(), 1)
    return LossOutput(loss, metrics, logps.spread(token_logps, tokens.index, shape))


def gather_tokens(request: Request, dtype: torch.dtype) -> TokenBatch:
    """The valid tokens of a call."""
    shape, device = request.completion_mask.shape, request.completion_mask.device
    index = logps.valid_index(request.completion_mask, request.completion_mask)
    sequence_index = _sequences(index, shape, request.cu_seqlens)

    def valid(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).index_select(0, index).to(dtype)

    advantages = request.advantages
    if advantages is None:
        assert request.rewards is not None
        advantages = group_advantages(request.rewards, request.group_size)
    if advantages.shape == (request.num_sequences,):
        token_advantages = advantages.detach().index_select(0, sequence_index).to(dtype)
    else:
        token_advantages = advantages.detach().reshape(-1).index_select(0, index).to(dtype)
    normalizer = request.normalizer
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=dtype, device=device).detach()
    old_logps, rollout_logps, corrections = valid(request.old_logps), valid(request.rollout_logps), None
    if old_logps is not None and rollout_logps is not None:
        corrections = reference.rollout_weights(
            old_logps, rollout_logps, sequence_index, request.num_sequences, request.objective
        )
        rollout_logps = None
    return TokenBatch(
        index=index,
        sequence_index=sequence_index,
        num_sequences=request.num_sequences,
        advantages=token_advantages,
        old_logps=old_logps,
        ref_logps=valid(request.ref_logps),
        rollout_logps=rollout_logps,
        corrections=corrections,
        weights=reference.token_weights(
            sequence_index, request.num_sequences, normalizer, token_advantages, request.objective
        ),
        beta=torch.as_tensor(request.beta, dtype=dtype, device=device).detach(),
        objective=request.objective,
    )


def _sequences(index: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence of each valid token."""
    if cu_seqlens is None:
        return index // max(shape[1], 1)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), index, right=True)


class ExpoLoss(nn.Module):
    """`expo_loss` as a module: `ExpoLoss(objective)(logits, completion_ids, completion_mask, ...)`.

    Args:
        objective: everything static about the loss; None: `Objective()`.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = Objective() if objective is None else objective

    def forward(self, logits: Tensor, completion_ids: Tensor, completion_mask: Tensor, **options: Any) -> LossOutput:
        """`expo_loss` with this module's objective; `options` are its keyword arguments."""
        return expo_loss(logits, completion_ids, completion_mask, objective=self.objective, **options)

    def extra_repr(self) -> str:
        """The objective."""
        return repr(self.objective)
