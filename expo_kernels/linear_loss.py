"""The policy loss from hidden states and the output head, without materializing [tokens, vocabulary] logits.

For each chunk of valid tokens, one product computes float32 logits, the loss overwrites them by dL/dlogits, and two
products compute dHidden and dWeight (summed in float32). That is 6*N*H*V floating-point operations without recompute,
and 8*N*H*V for a ratio per sequence if a sequence exceeds a chunk. `_engine.py` holds the loop, `_head.py` the head.

Letters: B sequences, T completion positions, N valid tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels._head import HeadTensors
from expo_kernels._head_module import head_tensors
from expo_kernels._inputs import check_inputs, fused_inputs
from expo_kernels._ops import LossOutput, call_policy_loss
from expo_kernels._vocab_group import local_head
from expo_kernels.objective import Objective


def linear_expo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    bias: Tensor | None = None,
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
    weight_dtype: torch.dtype | None = None,
    gradient_tolerance: float = 0.0,
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
    completion_lengths: Tensor | None = None,
    return_entropy: bool = False,
) -> LossOutput:
    """Policy loss of a batch from hidden states and the output head; differentiable in `hidden`, `weight`, `bias`.

    The forward pass also computes the gradients; `backward` only scales them. No gradient is computed for an input that
    needs none: a frozen head costs no dWeight product and no [V, H] buffer; `torch.no_grad()` costs only the logits.

    Args:
        hidden: [B, T, H], or packed [N, H], any float dtype; row t predicts `completion_ids[:, t]`.
        weight: [V, H] output head, any float dtype, which may differ from that of `hidden`; or the head's module, which
            has the bias too: `nn.Linear`, also with PEFT's LoRA (its gradient goes to the adapters; the adapted weight
            takes [V, H] of memory) or in PEFT's `modules_to_save`. PEFT's other kinds of adapters, and the base weight
            of an adapted layer, are refused.
        completion_ids: [B, T] or [N] integers, in [0, V) where the mask is 1.
        completion_mask: [B, T] or [N], bool or 0/1; 1 for valid tokens.
        bias: [V], or None.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.
        vocab_group: process group of a vocabulary-parallel head (tensor parallelism): `weight` is [V_r, H] and `bias`
            [V_r], the rows of the vocabulary in the order of the ranks; each rank holds at least one, and the numbers
            may differ. All other arguments are the same on every rank. Every rank returns the loss, metrics, log-probs
            and dHidden (summed over the group) of the whole head, and dWeight and dBias of its own rows. A chunk
            costs one small all-gather by the kernels, and two small reductions in PyTorch. A DTensor with placements
            (Shard(0),) needs no `vocab_group`.
        weight_dtype: dtype to which the weight is rounded in this call, as `weight.to(weight_dtype)` would, except that
            the gradient is not rounded: for a float32 weight with bfloat16 products. None: the weight is not rounded.
        gradient_tolerance: largest relative error, in the Frobenius norm, of the gradients of `hidden` and of `weight`.
            0.0: none but rounding. > 0: the gradient products leave out the columns of the vocabulary that a proved
            bound allows, see docs/gradient-tolerance.md; loss, metrics and log-probs stay the same bits. On a GPU
            several chunks take `logits_budget_mb` twice. Not with a vocabulary-parallel head.
        advantages: [B], [B, T], or packed [B] or [N] (with B = N it is read per sequence).
        rewards: [B] floats instead of `advantages`, with `group_size`: see `group_advantages`.
        group_size: G, rollouts per question; those of one question are adjacent.
        old_logps: shaped like the mask, nats, under the old policy; None: on-policy, the ratio is exactly 1 and has a
            gradient.
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
        completion_lengths: [B] integers on the CPU, the number of valid tokens of each sequence. On a GPU the host
            then plans the chunks without waiting for the mask (None: with several chunks it waits once, see
            docs/gpu.md). They must be those of the mask: checked on a CPU and by `debug_checks`; their sum is
            checked on the device. Ignored under graph capture.
        return_entropy: also compute `metrics["entropy"]`, without gradient.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: shapes do not match, values are out of range, or options contradict each other.
        TypeError: an argument has the wrong type or dtype.
    """
    weight, bias = head_tensors(weight, bias)
    weight, bias, group_name = local_head(hidden, weight, bias, vocab_group)
    validate.head_fits(hidden, weight, bias)
    validate.dimensions("hidden", hidden, "BTH" if cu_seqlens is None else "NH")
    validate.ids_and_mask("hidden", hidden, completion_ids, "completion_mask", completion_mask)
    validate.same_device(hidden=hidden, weight=weight, bias=bias)
    if logits_budget_mb is not None:
        validate.number("logits_budget_mb", logits_budget_mb, low=0.0, above=True)
    if weight_dtype is not None:
        validate.product_dtype("weight_dtype", weight_dtype)
    validate.gradient_tolerance(gradient_tolerance, is_sharded=group_name is not None)
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
    inputs = fused_inputs(inputs, temperature, completion_lengths)
    return call_policy_loss(
        HeadTensors(hidden, weight, bias),
        completion_ids,
        inputs,
        budget_mb=logits_budget_mb,
        return_entropy=return_entropy,
        vocab_group=group_name,
        weight_dtype=weight_dtype,
        gradient_tolerance=gradient_tolerance,
    )


class LinearExpoLoss(nn.Module):
    """`linear_expo_loss` as a module: `LinearExpoLoss(objective)(hidden, weight, completion_ids, ...)`.

    Args:
        objective: the static choices of the loss; None: `Objective()`.
        gradient_tolerance: as in `linear_expo_loss`.
    """

    def __init__(self, objective: Objective | None = None, *, gradient_tolerance: float = 0.0) -> None:
        super().__init__()
        self.objective = Objective() if objective is None else objective
        self.gradient_tolerance = gradient_tolerance

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | nn.Module,
        completion_ids: Tensor,
        completion_mask: Tensor,
        **options: Any,
    ) -> LossOutput:
        """`linear_expo_loss` with this module's objective and tolerance; `options` are its keyword arguments."""
        options = {"gradient_tolerance": self.gradient_tolerance, **options}
        return linear_expo_loss(hidden, weight, completion_ids, completion_mask, objective=self.objective, **options)

    def extra_repr(self) -> str:
        """The objective, and the tolerance if there is one."""
        tolerance = f", gradient_tolerance={self.gradient_tolerance:g}" if self.gradient_tolerance else ""
        return repr(self.objective) + tolerance
