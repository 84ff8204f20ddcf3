"""TRL's entropy bonus: coefficient times the mean entropy over tokens, whatever the aggregation of the loss.

`linear_expo_loss` aggregates entropies as it does the loss. Where that weighs all tokens equally, a converted weight
gives TRL's mean in the same call; otherwise a second call does.

Letters: B sequences, T completion positions, V vocabulary, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from expo_kernels.linear_loss import linear_expo_loss
from expo_kernels.objective import Objective


def current_coefficient(trainer: Any) -> float:
    """The coefficient in this optimizer step: 0 without a bonus, or while adaptive control measures a high entropy."""
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


def bonus_in_loss(
    objective: Objective, coefficient: float, normalizer: Tensor | float, mask: Tensor, selected: Tensor
) -> Tensor | float | None:
    """The `entropy_bonus` with which the loss of the tokens in `mask` subtracts coefficient * mean entropy.

    None: there is none, because the mean is over the `selected` tokens only, because the aggregation weighs tokens by
    the lengths of their sequences, or because the coefficient is negative, which no `entropy_bonus` is.
    """
    if coefficient == 0.0:
        return 0.0
    if selected is not mask or objective.aggregation == "sequence" or coefficient < 0.0:
        return None
    return coefficient * normalizer * (objective.max_completion_length or 1) / mask.sum().clamp(min=1)


def entropy_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor, objective: Objective, **options: Any
) -> Tensor:
    """Minus the mean entropy of the valid tokens in nats, 0-dim; differentiable in `hidden`, `weight`, `bias`.

    Args:
        hidden: [B, T, H].
        weight: [V, H].
        ids: [B, T] integers.
        mask: [B, T], 1 for the tokens of the mean.
        objective: its temperature and logit_softcap apply.
        options: `bias`, `logits_budget_mb` and `gradient_tolerance` of `linear_expo_loss`.
    """
    mean = Objective(aggregation="token", temperature=objective.temperature, logit_softcap=objective.logit_softcap)
    nothing = torch.zeros(mask.shape[0], device=hidden.device)
    output = linear_expo_loss(
        hidden, weight, ids, mask, advantages=nothing, beta=0.0, entropy_bonus=1.0, objective=mean, **options
    )
    return output.loss


def update_coefficient(trainer: Any, entropy: Tensor, tokens: Tensor) -> None:
    """Adaptive control (Skywork-OR1, arXiv 2505.22312): one step of the coefficient per optimizer step.

    Its state is in TRL's own attributes, which TRL's checkpoints contain.

    Args:
        trainer: TRL's trainer.
        entropy: 0-dim, nats, mean over the tokens of this micro-batch.
        tokens: 0-dim, their number.
    """
    window = torch.stack([entropy * tokens, tokens.to(entropy.dtype)])
    if trainer._entropy_window_stats is not None:
        window = window + trainer._entropy_window_stats
    trainer._entropy_window_stats = window
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(window, reduction="sum").tolist()
    mean, args = total / max(count, 1.0), trainer.args
    if mean <= args.entropy_target:
        trainer.entropy_coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        trainer.entropy_coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer._last_world_entropy, trainer._entropy_window_stats = mean, None
