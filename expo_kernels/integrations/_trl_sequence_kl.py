"""TRL's `use_bias_correction_kl` with sequence ratios: each token's KL times the ratio of its sequence, from log-probs.

The gradient of a token then depends on the KL of its whole sequence, which the losses of hidden states do not compute;
from log-probs it is a formula. Source: TRL 1.16, `GRPOTrainer._compute_loss`.

Letters: B sequences, T completion positions.
"""

import torch
from torch import Tensor

from expo_kernels.objective import Objective


def sequence_weighted_kl(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor, mask: Tensor, objective: Objective
) -> Tensor:
    """k3 of each token times exp of the mean of logp - old over its sequence, [B, T] in nats, 0 where masked.

    Args:
        logps: [B, T] nats; the result is differentiable in it, by way of the ratio too.
        old_logps: [B, T] nats; None: on-policy, a ratio of 1.
        ref_logps: [B, T] nats.
        mask: [B, T], 1 for valid tokens.
        objective: log-ratios are clamped to its `log_ratio_clamp`.
    """
    clamp, is_valid = objective.log_ratio_clamp, mask.bool()

    def differences(other: Tensor) -> Tensor:
        return torch.where(is_valid, other - logps, 0.0)  # padding may hold anything

    x = differences(ref_logps).clamp(-clamp, clamp)
    means = -differences(logps.detach() if old_logps is None else old_logps).sum(1) / lengths(mask)
    return (torch.expm1(x) - x) * means.clamp(-clamp, clamp).exp().unsqueeze(1)


def aggregated(values: Tensor, mask: Tensor, normalizer: Tensor | float, objective: Objective) -> Tensor:
    """Values of tokens, [B, T] and 0 where masked, aggregated as the losses are; 0-dim."""
    if objective.aggregation == "sequence":
        values = values / lengths(mask).unsqueeze(1)
    if objective.aggregation == "constant":
        assert objective.max_completion_length is not None
        values = values / objective.max_completion_length
    return values.sum() / normalizer


def lengths(mask: Tensor) -> Tensor:
    """Number of valid tokens of each sequence, at least 1, [B]."""
    return mask.sum(1).clamp(min=1)
