"""The policy loss: EXPO's (and GRPO's) objective on logits or on log-probs, and its gradient.

Source: FG-ExPO (arXiv 2605.11403), eq. 1 to 3 and algorithm 1, written out in `reference.py`. The gradient of a token
depends on the other tokens only through constants known beforehand (masks, lengths, the normalizer), so each chunk of
logits is read once: log-probs, then dL/dlogp by differentiating the formula on those few numbers, then dL/dlogits in
the chunk's own memory. For a ratio of whole sequences chunks hold whole sequences; where one exceeds a chunk, a pass
for the log-probs comes first.

Letters: B sequences, T completion positions, N valid tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from expo_kernels import _launch, _rows, reference
from expo_kernels import _validate as validate
from expo_kernels._request import SUMS, Request, check_request
from expo_kernels.advantages import advantages_of_rewards
from expo_kernels.logps import (
    check_id_values,
    check_ids_and_mask,
    in_places,
    made_gradients,
    make_source,
    spread,
    valid_index,
)
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
        # inside an op autograd is out of force; `torch.func.grad`, which is not, fails there under a dispatch mode
        with (
            torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
            torch.enable_grad(),
        ):
            leaf = logps.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.loss(leaf), leaf)
        return slopes

    def summary(self, logps: Tensor, entropies: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The whole loss 0-dim, the metrics [len(SUMS)] in that order, and the number of tokens."""
        terms = self.terms(logps)
        loss, total = (terms.losses * self.weights).sum(), logps.numel()
        num_tokens = torch.full((), total, dtype=torch.int64, device=logps.device)
        # a ratio is > 0, so the 0 shows only where there is no token
        ratios = torch.cat([terms.ratios, terms.ratios.new_zeros(1)])
        sums = {
            "kl": terms.penalties.sum(),
            "ratio_mean": terms.ratios.sum(),
            "clip_low_fraction": terms.clipped_low.to(logps.dtype).sum(),
            "clip_high_fraction": terms.clipped_high.to(logps.dtype).sum(),
            "entropy": logps.new_zeros(()) if entropies is None else entropies.sum(),
        }
        means = {name: value / max(total, 1) for name, value in sums.items()}
        others = {"loss": loss, "ratio_max": ratios.max(), "tokens": num_tokens.to(logps.dtype)}
        return loss, torch.stack([(means | others)[name] for name in SUMS]), num_tokens


@dataclass(frozen=True)
class _Options:
    """All that is not differentiated."""

    chosen_ids: Tensor  # [N] int64
    tokens: TokenBatch
    budget_mb: float | None
    return_entropy: bool


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


# --- the registered ops

# loss 0-dim, metrics [len(SUMS)], number of tokens 0-dim, log-probs like the mask, the gradients that are wanted
_Made = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


@torch.library.custom_op("expo_kernels::policy_loss", mutates_args=())
def _policy_loss(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    completion_ids: Tensor,
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
    logits_budget_mb: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss, and the gradients of those of states, weight and bias that want one, made at once (see `_Made`).

    The gradients are for autograd alone, which scales them in place.
    """
    of_states, of_weight, of_bias = wants_grad
    return _run(
        (states, weight, bias),
        (of_states, of_weight, of_bias),
        completion_ids,
        Request.unpack(completion_mask, packed, objective, group_size),
        budget_mb=logits_budget_mb,
        return_entropy=return_entropy,
    )


@_policy_loss.register_fake
def _(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    _: Tensor,
    completion_mask: Tensor,
    *__: Any,
) -> _Made:
    dtype = _rows.arithmetic_dtype(states, weight, bias)
    # gradients of ready logits have their dtype, those of sums over tokens the arithmetic's
    grad_dtype = states.dtype if weight is None else dtype
    given = zip((states, weight, bias), wants_grad, strict=True)
    gradients = [
        tensor.new_empty(tensor.shape, dtype=grad_dtype) for tensor, wanted in given if wanted and tensor is not None
    ]
    return *_fake_loss(completion_mask, dtype), gradients


@torch.library.custom_op("expo_kernels::policy_loss_", mutates_args={"logits"})
def _policy_loss_in_place(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of ready logits, whose gradient is written over them."""
    request = Request.unpack(completion_mask, packed, objective, group_size)
    *made, (gradient,) = _run(
        (logits, None, None),
        (True, False, False),
        completion_ids,
        request,
        budget_mb=None,
        return_entropy=return_entropy,
        in_place=True,
    )
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)
    loss, metrics, num_tokens, token_logps = made
    return loss, metrics, num_tokens, token_logps


@_policy_loss_in_place.register_fake
def _(logits: Tensor, _: Tensor, completion_mask: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_loss(completion_mask, _rows.arithmetic_dtype(logits))


@torch.library.custom_op("expo_kernels::policy_loss_from_logps", mutates_args=())
def _policy_loss_from_logps(
    logps: Tensor,
    wants_grad: list[bool],
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss of ready log-probs, and its gradient in them (see `_Made`)."""
    request = Request.unpack(completion_mask, packed, objective, group_size)
    if _launch.use_kernels(logps):
        from expo_kernels import _fused

        loss, metrics, num_tokens, slopes = _fused.loss_of_logps(logps, request)
        kept = logps.float().masked_fill(completion_mask == 0, 0.0)
        return loss, metrics, num_tokens, kept, [slopes] if wants_grad[0] else []
    tokens = gather_tokens(request, _rows.arithmetic_dtype(logps))
    valid = logps.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype)
    gradients = [spread(tokens.logp_slopes(valid), tokens.index, logps.shape)] if wants_grad[0] else []
    return *tokens.summary(valid), spread(valid, tokens.index, logps.shape), gradients


@_policy_loss_from_logps.register_fake
def _(logps: Tensor, wants_grad: list[bool], completion_mask: Tensor, *_: Any) -> _Made:
    dtype = _rows.arithmetic_dtype(logps)
    return *_fake_loss(completion_mask, dtype), [logps.new_empty(logps.shape, dtype=dtype)] if wants_grad[0] else []


@torch.library.custom_op("expo_kernels::with_gradient", mutates_args=())
def _with_gradient(loss: Tensor, states: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001 - for autograd alone
    """The loss again, whose gradient in `states` is known already."""
    return loss.clone()


@_with_gradient.register_fake
def _(loss: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _fake_loss(completion_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        completion_mask.new_empty((), dtype=dtype),
        completion_mask.new_empty(len(SUMS), dtype=dtype),
        completion_mask.new_empty((), dtype=torch.int64),
        completion_mask.new_empty(completion_mask.shape, dtype=dtype),
    )


def _run(
    states: tuple[Tensor, Tensor | None, Tensor | None],
    wants_grad: tuple[bool, bool, bool],
    completion_ids: Tensor,
    request: Request,
    *,
    budget_mb: float | None,
    return_entropy: bool,
    in_place: bool = False,
) -> _Made:
    """What `_policy_loss` returns, by the kernels or by PyTorch."""
    check_id_values(states[0], states[1], completion_ids, request.completion_mask)
    with torch.autocast(states[0].device.type, enabled=False):
        if _launch.use_kernels(*states):
            from expo_kernels import _fused

            *made, gradients = _fused.loss_of_states(
                *states,
                completion_ids,
                request,
                wants_grad=wants_grad,
                budget_mb=budget_mb,
                return_entropy=return_entropy,
                in_place=in_place,
            )
            loss, metrics, num_tokens, token_logps = made
            return loss, metrics, num_tokens, token_logps, made_gradients(gradients, states)
        tokens = gather_tokens(request, _rows.arithmetic_dtype(*states))
        chosen_ids = completion_ids.reshape(-1).index_select(0, tokens.index).long()
        source = make_source(*states, tokens.index, wants_grad, in_place=in_place)
        token_logps, entropies = _run_chunks(
            source, _Options(chosen_ids, tokens, budget_mb, return_entropy), any(wants_grad)
        )
        gradients = source.gradients() if any(wants_grad) else (None, None, None)
        at_positions = spread(token_logps, tokens.index, completion_ids.shape)
        return *tokens.summary(token_logps, entropies), at_positions, made_gradients(gradients, states)


def _register_gradients(op: Any, num_states: int) -> None:
    """Autograd of an op that returns `_Made` and takes its states first, then which of them want a gradient."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: _Made) -> None:
        _, *others, gradients = output
        wants_grad = inputs[num_states]
        ctx.set_materialize_grads(False)  # or backward would be given zeros as large as the gradients
        ctx.mark_non_differentiable(*others, *gradients)
        ctx.save_for_backward(*gradients)
        ctx.wants_grad, ctx.num_others = wants_grad, len(inputs) - num_states
        ctx.dtypes = [tensor.dtype for tensor, wanted in zip(inputs, wants_grad, strict=False) if wanted]

    @once_differentiable
    def scale(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return tuple([None] * (num_states + ctx.num_others))
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        made = [_scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs]
        return *in_places(made, ctx.wants_grad), *(None,) * ctx.num_others

    op.register_autograd(scale, setup_context=keep)


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    _, states, gradient = inputs
    ctx.save_for_backward(gradient)
    ctx.dtype = states.dtype


@once_differentiable
def _scale_gradient(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None, _scaled(gradient, grad_loss, ctx.dtype), None


_register_gradients(_policy_loss, num_states=3)
_register_gradients(_policy_loss_from_logps, num_states=1)
_with_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_loss * gradient in the input's dtype, rounded once, and in the gradient's own memory where it fits there."""
    if type(gradient) is not Tensor:
        # a tracer's stand-in: the compiler decides what is written where
        return (gradient * grad_loss).to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype))
    # a second backward may come for the same numbers
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * grad_loss
    if _launch.use_kernels(gradient):
        from expo_kernels import _row_launchers

        _row_launchers.launch_scale(gradient, grad_loss)
        return gradient
    # reading the number is free on CPU and saves a pass over [V, H]
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    return gradient if is_one else gradient.mul_(grad_loss)


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
    check_ids_and_mask("logits", logits, completion_ids, "completion_mask", completion_mask)
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
    validate.is_tensor("completion_mask", completion_mask)
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
    packed = request.pack(_rows.arithmetic_dtype(logps))
    wants_grad = [logps.requires_grad and torch.is_grad_enabled()]
    made = _policy_loss_from_logps(
        logps, wants_grad, completion_mask, packed, request.objective.text, request.group_size
    )
    return _output(*made[:4], return_entropy=False)


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
    packed = request.pack(_rows.arithmetic_dtype(states, weight, bias))
    mask, objective, group_size = request.completion_mask, request.objective.text, request.group_size
    wants_grad = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in (states, weight, bias)
    ]
    if in_place and wants_grad[0]:
        logits = states.detach()
        loss, *others = _policy_loss_in_place(
            logits, completion_ids, mask, packed, objective, group_size, return_entropy
        )
        return _output(_with_gradient(loss, states, logits), *others, return_entropy=return_entropy)
    made = _policy_loss(
        states,
        weight,
        bias,
        wants_grad,
        completion_ids,
        mask,
        packed,
        objective,
        group_size,
        budget_mb,
        return_entropy,
    )
    return _output(*made[:4], return_entropy=return_entropy)


def _output(
    loss: Tensor, metrics: Tensor, num_tokens: Tensor, token_logps: Tensor, *, return_entropy: bool
) -> LossOutput:
    named = dict(zip(SUMS, metrics.unbind(), strict=True)) | {"tokens": num_tokens}
    del named["loss"]
    if not return_entropy:
        del named["entropy"]
    return LossOutput(loss, named, token_logps)


def gather_tokens(request: Request, dtype: torch.dtype) -> TokenBatch:
    """The valid tokens of a call."""
    shape, device = request.completion_mask.shape, request.completion_mask.device
    index = valid_index(request.completion_mask, request.completion_mask)
    sequence_index = _sequences(index, shape, request.cu_seqlens)

    def valid(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).index_select(0, index).to(dtype)

    advantages = request.advantages
    if advantages is None:
        assert request.rewards is not None
        advantages = advantages_of_rewards(request.rewards, request.group_size)
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
