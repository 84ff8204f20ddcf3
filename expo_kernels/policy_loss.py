"""The policy loss of EXPO and GRPO from logits or from log-probs, and its gradient.

Source: FG-ExPO (arXiv 2605.11403), eq. 1 to 3 and algorithm 1; `reference.py` has the formulas. The functions check
shapes; the registered ops of `_ops.py` do the work.

Letters: B sequences, T completion positions, N valid tokens, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels._head import HeadTensors
from expo_kernels._inputs import check_inputs, fused_inputs
from expo_kernels._ops import LossOutput, call_policy_loss, call_policy_loss_from_logps
from expo_kernels.objective import Objective

__all__ = ["ExpoLoss", "LossOutput", "expo_loss", "expo_loss_from_logps"]


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
    temperature: float | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_bonus: float | Tensor = 0.0,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
) -> LossOutput:
    """Policy loss of a batch from its logits: 0-dim loss, metrics and log-probs; differentiable in `logits`.

    Source: FG-ExPO (arXiv 2605.11403) eq. 1 to 3; `objective` selects the variant. Values at masked positions of any
    tensor, NaN included, are ignored.

    Args:
        logits: [B, T, V], or packed [N, V], any float dtype; row t predicts `completion_ids[:, t]`. Not yet divided by
            the temperature.
        completion_ids: [B, T] or [N] integers, in [0, V) where the mask is 1.
        completion_mask: [B, T] or [N], bool or 0/1; 1 for valid tokens.
        advantages: [B], [B, T], or packed [B] or [N] (with B = N it is read per sequence).
        rewards: [B] floats instead of `advantages`, with `group_size`: see `group_advantages`.
        group_size: G, rollouts per question; those of one question are adjacent.
        old_logps: shaped like the mask, nats, under the old policy, the denominator of the ratio; None: on-policy, the
            ratio is exactly 1 and has a gradient.
        ref_logps: shaped like the mask, nats, under the frozen reference policy; None only if beta = 0.
        rollout_logps: shaped like the mask, nats, as the sampler reported them; required by
            `objective.rollout_correction`, else None.
        beta: >= 0, weight of the KL penalty; a 0-dim tensor is not copied to the host.
        objective: the static choices of the loss; None: `Objective()`.
        temperature: > 0, in place of `objective.temperature`, for replies or tokens sampled at different ones: a tensor
            of floats, [B] or shaped like the mask, without gradient; or a number. None: the objective's.
        normalizer: > 0, the denominator over all micro-batches and ranks: number of sequences (tokens for aggregation
            "token"); None: that of this call.
        entropy_bonus: >= 0, weight of the entropies of the tokens' distributions (nats), which are aggregated by
            `objective.aggregation` and subtracted from the loss; a 0-dim tensor is not copied to the host. 0.0 costs
            nothing.
        cu_seqlens: [B + 1] int32, cumulative lengths of the packed sequences; required with packed input, else None.
        return_entropy: also compute `metrics["entropy"]`.
        inplace: overwrite `logits` by their gradient.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: shapes do not match, values are out of range, or options contradict each other.
        TypeError: an argument has the wrong type or dtype.
    """
    validate.floating("logits", logits)
    validate.dimensions("logits", logits, "BTV" if cu_seqlens is None else "NV")
    validate.ids_and_mask("logits", logits, completion_ids, "completion_mask", completion_mask)
    inputs = check_inputs(
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
    inputs = fused_inputs(inputs, temperature)
    return call_policy_loss(HeadTensors(logits), completion_ids, inputs, return_entropy=return_entropy, inplace=inplace)


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
    """Policy loss of a batch from the caller's log-probs; differentiable in `logps`.

    Args:
        logps: [B, T], or packed [N], nats, computed at the temperature of the sampling.
        completion_mask: shaped like `logps`, bool or 0/1; 1 for valid tokens.
        advantages: as `expo_loss`.
        rewards: as `expo_loss`.
        group_size: as `expo_loss`.
        old_logps: as `expo_loss`.
        ref_logps: as `expo_loss`.
        rollout_logps: as `expo_loss`.
        beta: as `expo_loss`.
        objective: as `expo_loss`; its temperature and logit_softcap are not applied again.
        normalizer: as `expo_loss`.
        cu_seqlens: as `expo_loss`.

    Returns:
        `LossOutput`, without an entropy. With aggregation "none", its loss is shaped like `logps`, and 0 where masked.

    Raises:
        ValueError: shapes do not match, values are out of range, or options contradict each other.
        TypeError: an argument has the wrong type or dtype.
    """
    validate.floating("logps", logps)
    validate.dimensions("logps", logps, "BT" if cu_seqlens is None else "N")
    validate.per_token("completion_mask", completion_mask, "logps", logps.shape)
    validate.same_device(logps=logps, completion_mask=completion_mask)
    inputs = check_inputs(
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
    return call_policy_loss_from_logps(logps, inputs)


class ExpoLoss(nn.Module):
    """`expo_loss` as a module: `ExpoLoss(objective)(logits, completion_ids, completion_mask, ...)`.

    Args:
        objective: the static choices of the loss; None: `Objective()`.
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
