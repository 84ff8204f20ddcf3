"""The policy loss: EXPO's (and GRPO's) objective on logits or on log-probs, and its gradient.

Source: FG-ExPO (arXiv 2605.11403), eq. 1 to 3 and algorithm 1, written out in `reference.py`. Shapes are checked here;
the work is done by the registered ops of `_policy_ops.py`.

Letters: B sequences, T completion positions, N valid tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expo_kernels import _rows
from expo_kernels import _validate as validate
from expo_kernels._policy_ops import policy_loss, policy_loss_from_logps, policy_loss_in_place, with_gradient
from expo_kernels._request import SUMS, Request, check_request
from expo_kernels.logps import check_ids_and_mask
from expo_kernels.objective import Objective


class LossOutput(NamedTuple):
    """What a loss call returns."""

    loss: Tensor
    """0-dim: call .backward() on it."""

    metrics: dict[str, Tensor]
    """0-dim tensors on the device, detached; means over valid tokens (0 where there are none):
    `kl` nats of the chosen estimator, importance weight included where it is on; 0 without `ref_logps`;
    `ratio_mean`, `ratio_max` of pi_theta / pi_old, of the token or of its sequence ("gmpo": of the sequence, clipped);
    `clip_low_fraction`, `clip_high_fraction` share of valid tokens for which the surrogate's lower or upper clipped
    term was chosen (the dual clip's cap counts as upper; always 0 for "sapo" and "vespo");
    `tokens` number of valid tokens; `entropy` nats, only with `return_entropy`."""

    logps: Tensor
    """Log-probs in nats, shaped like `completion_mask`, float32, detached, 0 where masked."""


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
    entropy_bonus: float | Tensor = 0.0,
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
        entropy_bonus: >= 0, nats of loss per nat: the loss less this times the entropies of the tokens' distributions,
            aggregated as `objective.aggregation` says; a 0-dim tensor is read on its device. 0.0 costs nothing.
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
        entropy_bonus=entropy_bonus,
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
    made = policy_loss_from_logps(
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
    vocab_group: str | None = None,
) -> LossOutput:
    """Loss of validated arguments: `states` are hidden states where a head `weight` is given, else logits."""
    packed = request.pack(_rows.arithmetic_dtype(states, weight, bias))
    mask, objective, group_size = request.completion_mask, request.objective.text, request.group_size
    wants_grad = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in (states, weight, bias)
    ]
    if in_place and wants_grad[0]:
        logits = states.detach()
        loss, *others = policy_loss_in_place(
            logits, completion_ids, mask, packed, objective, group_size, return_entropy
        )
        return _output(with_gradient(loss, states, logits), *others, return_entropy=return_entropy)
    made = policy_loss(
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
        vocab_group,
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
