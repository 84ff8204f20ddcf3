"""The policy loss from hidden states and the output head, without ever holding [tokens, vocabulary] logits.

Per chunk of valid tokens: one product makes float32 logits, the loss turns them into dL/dlogits in place, two products
turn that into dHidden and dWeight (summed in float32). That is 6*N*H*V floating-point operations and no recompute;
8*N*H*V for a ratio per sequence once a sequence exceeds a chunk. `_engine.py` holds the loop, `_head.py` the head.

Letters: B sequences, T completion positions, N valid tokens, H hidden, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels._head import HeadTensors
from expo_kernels._inputs import check_inputs
from expo_kernels._ops import LossOutput, call_policy_loss
from expo_kernels._vocab_group import local_head
from expo_kernels.objective import Objective


def linear_expo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    bias: Tensor | None = None,
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
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
) -> LossOutput:
    """Policy loss of a batch from hidden states and the output head; differentiable in `hidden`, `weight`, `bias`.

    The gradients are made while the loss is, and `backward` only scales them. An input that needs no gradient costs
    nothing: no dWeight product and no [V, H] buffer for a frozen head, only the logits under `torch.no_grad()`.

    Args:
        hidden: [B, T, H], or packed [N, H], any float dtype; row t predicts `completion_ids[:, t]`.
        weight: [V, H] output head, any float dtype, which need not be that of `hidden`.
        completion_ids: [B, T] or [N] integers in [0, V) wherever the mask is 1.
        completion_mask: [B, T] or [N], bool or 0/1: where the token counts.
        bias: [V], or None.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.
        vocab_group: process group whose ranks share the head by vocabulary (tensor parallelism): `weight` is [V_r, H]
            and `bias` [V_r], the rows of the vocabulary in order of the ranks, as many on each as it likes (at least
            one); all else is the same on every rank. Loss, metrics, log-probs and dHidden, already summed over the
            group, are then those of one process on every rank, dWeight and dBias those of its rows. Two small
            reductions a chunk. Runs in PyTorch on every device. A DTensor with placements (Shard(0),) says the same of
            itself.
        advantages: [B], [B, T], or packed [B] or [N] (with B = N it is read per sequence).
        rewards: [B] floats instead of `advantages`, with `group_size`: see `group_advantages`.
        group_size: G, rollouts per question, adjacent.
        old_logps: like the mask, nats; None: on-policy, ratio exactly 1 with a gradient.
        ref_logps: like the mask, nats, under the frozen reference; None only with beta = 0.
        rollout_logps: like the mask, nats, as the sampler reported them; goes with `objective.rollout_correction`.
        beta: >= 0, weight of the KL penalty; a 0-dim tensor is read on its device.
        objective: everything static; None: `Objective()`.
        normalizer: > 0, the denominator over all micro-batches and ranks: sequences (tokens for aggregation "token");
            None: counted from this call.
        entropy_bonus: >= 0, nats of loss per nat: the loss less this times the entropies of the tokens' distributions,
            aggregated as `objective.aggregation` says; a 0-dim tensor is read on its device. 0.0 costs nothing.
        cu_seqlens: [B + 1] int32, where each packed sequence starts and ends; only and always with packed input.
        return_entropy: also compute `metrics["entropy"]`, without gradient.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: shapes that do not fit, values out of range, options that contradict each other.
        TypeError: an argument of the wrong type or dtype.
    """
    weight, bias, group_name = local_head(hidden, weight, bias, vocab_group)
    validate.head_fits(hidden, weight, bias)
    validate.dimensions("hidden", hidden, "BTH" if cu_seqlens is None else "NH")
    validate.ids_and_mask("hidden", hidden, completion_ids, "completion_mask", completion_mask)
    validate.same_device(hidden=hidden, weight=weight, bias=bias)
    if logits_budget_mb is not None:
        validate.number("logits_budget_mb", logits_budget_mb, low=0.0, above=True)
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
    return call_policy_loss(
        HeadTensors(hidden, weight, bias),
        completion_ids,
        inputs,
        budget_mb=logits_budget_mb,
        return_entropy=return_entropy,
        vocab_group=group_name,
    )


class LinearExpoLoss(nn.Module):
    """`linear_expo_loss` as a module: `LinearExpoLoss(objective)(hidden, weight, completion_ids, ...)`.

    Args:
        objective: everything static about the loss; None: `Objective()`.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = Objective() if objective is None else objective

    def forward(
        self, hidden: Tensor, weight: Tensor, completion_ids: Tensor, completion_mask: Tensor, **options: Any
    ) -> LossOutput:
        """`linear_expo_loss` with this module's objective; `options` are its keyword arguments."""
        return linear_expo_loss(hidden, weight, completion_ids, completion_mask, objective=self.objective, **options)

    def extra_repr(self) -> str:
        """The objective."""
        return repr(self.objective)
