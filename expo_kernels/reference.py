"""The formulas in plain PyTorch, in the paper's order: the truth in tests and the arithmetic of the CPU path.

Source: FG-ExPO (arXiv 2605.11403), equation numbers beside each function; `objective.py` names the other papers.
Nothing here casts: float64 in, float64 truth out; float32 in, the shipped CPU numbers out.

Letters: B sequences, T completion positions, V vocabulary, H hidden, G rollouts per question, Q questions.
Per-token functions take the N valid tokens only, [N], with `sequence_index` [N] int64 naming the sequence of each:
a masked position is never read, so nothing in it can matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expo_kernels.objective import Objective


class TokenTerms(NamedTuple):
    """What the objective says of each valid token, all [N]."""

    losses: Tensor  # -surrogate + beta * penalty, before aggregation
    ratios: Tensor  # pi_theta / pi_old, of the token or of its sequence
    penalties: Tensor  # KL estimate in nats; 0 without a reference policy
    clipped_low: Tensor  # bool: the surrogate took its lower clipped term
    clipped_high: Tensor  # bool: it took its upper clipped term, or the dual clip's cap


def scaled_logits(logits: Tensor, temperature: float, logit_softcap: float | None = None) -> Tensor:
    """Logits as the softmax takes them: capped, then divided by the temperature. Same shape."""
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def token_logps(
    logits: Tensor, completion_ids: Tensor, temperature: float, logit_softcap: float | None = None
) -> Tensor:
    """Log-probability in nats of each chosen token: logits [..., V], ids [...] -> [...]."""
    logps = torch.log_softmax(scaled_logits(logits, temperature, logit_softcap), dim=-1)
    return logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)


def token_entropies(logits: Tensor, temperature: float, logit_softcap: float | None = None) -> Tensor:
    """Entropy in nats of each next-token distribution: logits [..., V] -> [...]."""
    logps = torch.log_softmax(scaled_logits(logits, temperature, logit_softcap), dim=-1)
    entropies: Tensor = torch.special.entr(logps.exp()).sum(-1)
    return entropies


def group_advantages(rewards: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    """Eq. 1: each reward against its own group, [B] -> [B]; population std (divide by G)."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # asked of the rewards themselves: the float mean of equal rewards need not equal them
    is_constant = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    centred = torch.where(is_constant, torch.zeros_like(centred), centred)
    if scale == "group":
        centred = centred / (groups.std(dim=1, keepdim=True, correction=0) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std(correction=0) + eps)
    return centred.reshape(-1)


def log_ratios(
    logps: Tensor, old_logps: Tensor, sequence_index: Tensor, num_sequences: int, objective: Objective
) -> Tensor:
    """log(pi_theta / pi_old) in nats, clamped, [N]; the mean over the sequence if the ratio is a sequence's."""
    differences = logps - old_logps
    if objective.ratio == "sequence":
        # GSPO eq. 7: the length-normalised ratio, shared by all tokens of the sequence
        lengths = sequence_sums(torch.ones_like(differences), sequence_index, num_sequences)
        sums = sequence_sums(differences, sequence_index, num_sequences)
        differences = (sums / lengths.clamp(min=1))[sequence_index]
    return differences.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)


def sequence_sums(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum over each sequence's tokens, [N] -> [B]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_index, values)


def surrogate_losses(
    logps: Tensor, ratios: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2, negated: loss per token, and whether its lower or its upper clipped term was chosen; each [N]."""
    if objective.surrogate == "sapo":
        tau = torch.full_like(ratios, objective.sapo_tau_neg).masked_fill(advantages > 0, objective.sapo_tau_pos)
        gates = torch.sigmoid(tau * (ratios - 1)) * 4 / tau
        never = torch.zeros_like(ratios, dtype=torch.bool)
        return -gates * advantages, never, never
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    clipped = ratios.clamp(low, high)
    if objective.surrogate == "cispo":
        return -clipped.detach() * advantages * logps, ratios < low, ratios > high
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    clipped_low = (ratios < low) & (advantages < 0)
    clipped_high = (ratios > high) & (advantages > 0)
    if objective.dual_clip is not None:
        capped = torch.minimum(losses, -objective.dual_clip * advantages)
        clipped_high = clipped_high | ((advantages < 0) & (capped < losses))
        losses = torch.where(advantages < 0, capped, losses)
    return losses, clipped_low, clipped_high


def kl_penalties(logps: Tensor, ref_logps: Tensor, objective: Objective) -> Tensor:
    """Eq. 3 (k3) or its kin: how far each sampled token drifted from the reference policy, nats, [N]."""
    x = (ref_logps - logps).clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)
    if objective.kl == "k1":
        return -x
    if objective.kl == "k2":
        return 0.5 * x * x
    # exp(x) - x - 1, where expm1 keeps the digits that exp(x) - 1 would lose near x = 0
    return torch.expm1(x) - x


def rollout_weights(
    old_logps: Tensor, rollout_logps: Tensor, sequence_index: Tensor, num_sequences: int, objective: Objective
) -> Tensor:
    """Truncated weight of each token's surrogate for what the sampler's own numerics did, [N], a constant."""
    differences = (old_logps - rollout_logps).detach()
    if objective.rollout_correction == "sequence":
        differences = sequence_sums(differences, sequence_index, num_sequences)[sequence_index]
    clamp = objective.log_ratio_clamp
    return differences.clamp(-clamp, clamp).exp().clamp(max=objective.rollout_cap)


def token_terms(
    logps: Tensor,
    *,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_logps: Tensor | None,
    advantages: Tensor,
    beta: Tensor,
    sequence_index: Tensor,
    num_sequences: int,
    objective: Objective,
    corrections: Tensor | None = None,
) -> TokenTerms:
    """Loss of each valid token, -surrogate + beta * penalty (paper: J = J_clip - beta_eff E[D]), and its parts.

    `corrections` [N] are the `rollout_weights` where they are known already; otherwise `rollout_logps` make them.
    """
    # on-policy: the ratio is exactly 1, and its gradient that of logps
    old_logps = logps.detach() if old_logps is None else old_logps
    ratios = log_ratios(logps, old_logps, sequence_index, num_sequences, objective).exp()
    losses, clipped_low, clipped_high = surrogate_losses(logps, ratios, advantages, objective)
    if rollout_logps is not None:
        corrections = rollout_weights(old_logps, rollout_logps, sequence_index, num_sequences, objective)
    if corrections is not None:
        losses = losses * corrections
    penalties = torch.zeros_like(logps)
    if ref_logps is not None:
        penalties = kl_penalties(logps, ref_logps, objective)
        if objective.kl_importance_weighted:
            clamp = objective.log_ratio_clamp
            penalties = penalties * (logps - old_logps).clamp(-clamp, clamp).exp()
        losses = losses + beta * penalties
    return TokenTerms(losses, ratios, penalties, clipped_low, clipped_high)


def token_weights(
    sequence_index: Tensor, num_sequences: int, normalizer: Tensor | None, like: Tensor, objective: Objective
) -> Tensor:
    """Share of each valid token in the loss, [N], so that loss = sum(weights * losses)."""
    ones = torch.ones_like(like)
    if objective.aggregation == "token":
        return ones / (max(like.numel(), 1) if normalizer is None else normalizer)
    ones = ones / (max(num_sequences, 1) if normalizer is None else normalizer)
    if objective.aggregation == "sequence":
        lengths = sequence_sums(torch.ones_like(like), sequence_index, num_sequences)
        return ones / lengths[sequence_index]
    assert objective.max_completion_length is not None
    return ones / objective.max_completion_length


def expo_loss_from_logps(
    logps: Tensor,
    completion_mask: Tensor,
    *,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_logps: Tensor | None,
    beta: Tensor,
    objective: Objective,
    normalizer: Tensor | None = None,
) -> Tensor:
    """The whole loss of a padded batch, 0-dim: logps and mask [B, T], advantages [B]."""
    sequence_index, position = completion_mask.nonzero(as_tuple=True)

    def valid(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[sequence_index, position]

    tokens = logps[sequence_index, position]
    num_sequences = logps.shape[0]
    terms = token_terms(
        tokens,
        old_logps=valid(old_logps),
        ref_logps=valid(ref_logps),
        rollout_logps=valid(rollout_logps),
        advantages=advantages[sequence_index],
        beta=beta,
        sequence_index=sequence_index,
        num_sequences=num_sequences,
        objective=objective,
    )
    weights = token_weights(sequence_index, num_sequences, normalizer, tokens, objective)
    return (weights * terms.losses).sum()


def akl_scale(accuracy: Tensor, rho: str) -> Tensor:
    """Eq. 8: rho(x) = (tanh(x) + 1) / 2, monotone in (0, 1); "constant" is 1, which is GRPO."""
    return (torch.tanh(accuracy) + 1) / 2 if rho == "tanh" else torch.ones_like(accuracy)


def smoothed_pass_rates(pass_rates: Tensor, new_rates: Tensor, momentum: float | Tensor) -> Tensor:
    """Eq. 6: p~ <- momentum * p~ + (1 - momentum) * the question's mean reward, [K]."""
    return momentum * pass_rates + (1 - momentum) * new_rates


def counted_momentum(visits: Tensor, momentum: float | Tensor) -> Tensor:
    """Ours, not the paper's: eq. 6's momentum after so many visits, [K], with which it is the running mean of the first
    1 / (1 - momentum) visits and the moving average after them; the first visit keeps nothing of p~."""
    return (visits / (visits + 1)).clamp(max=momentum)


def log_curriculum_weights(pass_rates: Tensor, mean: float, std: float) -> Tensor:
    """Eq. 7: log w = -(p~ - mean)^2 / (2 std^2), [Q]; in logs because a narrow std underflows w."""
    return -((pass_rates - mean) ** 2) / (2 * std**2)
