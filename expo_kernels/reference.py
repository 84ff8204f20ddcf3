"""The formulas in plain PyTorch, in the paper's order: the ground truth of tests and the arithmetic of the CPU path.

Source: FG-ExPO (arXiv 2605.11403); each function gives the equation number; `objective.py` names the other papers.
No function casts: float64 inputs give the float64 truth of tests, float32 inputs the numbers of the CPU path.

Letters: B sequences, T completion positions, V vocabulary, H hidden, G rollouts per question, Q questions.
Per-token functions take only the N valid tokens, [N], and `sequence_index` [N] int64, the sequence of each token.
Masked positions are never read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from expo_kernels.objective import Objective


class TokenTerms(NamedTuple):
    """The terms of the objective for each valid token, all [N]."""

    losses: Tensor  # -surrogate + beta * penalty, before aggregation
    ratios: Tensor  # pi_theta / pi_old of the token or of its sequence; "gmpo": of its sequence, clipped
    penalties: Tensor  # KL estimate in nats; 0 without a reference policy
    clipped_low: Tensor  # bool: the surrogate's lower clipped term was chosen
    clipped_high: Tensor  # bool: its upper clipped term, or the dual clip's cap, was chosen


def scaled_logits(logits: Tensor, temperature: float | Tensor, logit_softcap: float | None = None) -> Tensor:
    """The inputs of the softmax: logits [..., V], capped and then divided by the temperature, one or [...]."""
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def token_logps(
    logits: Tensor, completion_ids: Tensor, temperature: float | Tensor, logit_softcap: float | None = None
) -> Tensor:
    """Log-probability in nats of each chosen token: logits [..., V], ids [...] -> [...]."""
    logps = torch.log_softmax(scaled_logits(logits, temperature, logit_softcap), dim=-1)
    return logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)


def token_entropies(logits: Tensor, temperature: float | Tensor, logit_softcap: float | None = None) -> Tensor:
    """Entropy in nats of each next-token distribution: logits [..., V] -> [...]."""
    logps = torch.log_softmax(scaled_logits(logits, temperature, logit_softcap), dim=-1)
    entropies: Tensor = torch.special.entr(logps.exp()).sum(-1)
    return entropies


def log_sum_exps(logits: Tensor, temperature: float | Tensor, logit_softcap: float | None = None) -> Tensor:
    """Log-sum-exp in nats of each row, logits [..., V] -> [...]; PaLM's z-loss (arXiv 2204.02311) is its square."""
    return torch.logsumexp(scaled_logits(logits, temperature, logit_softcap), dim=-1)


def group_advantages(rewards: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    """Eq. 1: advantage of each reward relative to its group, [B] -> [B]; population std (divide by G)."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # compares the rewards themselves: the rounded mean of equal rewards may differ from them
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
    """log(pi_theta / pi_old) in nats, clamped, [N]; the mean over the sequence if the ratio is per sequence."""
    differences = logps - old_logps
    if objective.ratio != "token":
        # GSPO (arXiv 2507.18071) eq. 7: the length-normalised ratio, shared by all tokens of the sequence
        differences = sequence_means(differences, sequence_index, num_sequences)
    if objective.ratio == "sequence_token":
        # GSPO-token, eq. 14: sg[s_i] * pi_theta / sg[pi_theta], so that each token has the gradient of its own log-prob
        differences = differences.detach() + (logps - logps.detach())
    return differences.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)


def sequence_sums(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum over each sequence's tokens, [N] -> [B]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_index, values)


def sequence_means(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Mean over each token's sequence, [N] -> [N]."""
    lengths = sequence_sums(torch.ones_like(values), sequence_index, num_sequences)
    return (sequence_sums(values, sequence_index, num_sequences) / lengths.clamp(min=1))[sequence_index]


def clip_bounds(objective: Objective) -> tuple[float, float]:
    """Eq. 2: lower and upper bound of the clipped ratio."""
    return 1 - objective.clip_low, 1 + objective.clip_high


def clip_surrogate(ratios: Tensor, advantages: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2, negated, capped as in dual-clip PPO (arXiv 1912.09729): loss, and which clipped term was chosen, [N]."""
    low, high = clip_bounds(objective)
    losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
    clipped_low = (ratios < low) & (advantages < 0)
    clipped_high = (ratios > high) & (advantages > 0)
    if objective.dual_clip is not None:
        capped = torch.minimum(losses, -objective.dual_clip * advantages)
        clipped_high = clipped_high | ((advantages < 0) & (capped < losses))
        losses = torch.where(advantages < 0, capped, losses)
    return losses, clipped_low, clipped_high


def cispo_surrogate(
    logps: Tensor, ratios: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO (arXiv 2506.13585), negated: the log-prob times the clipped ratio, a constant; and which were clipped."""
    low, high = clip_bounds(objective)
    return -ratios.clamp(low, high).detach() * advantages * logps, ratios < low, ratios > high


def sapo_surrogate(ratios: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """SAPO (arXiv 2511.20347), negated: a sigmoid centred at ratio 1 instead of the clip, [N]."""
    tau = torch.full_like(ratios, objective.sapo_tau_neg).masked_fill(advantages > 0, objective.sapo_tau_pos)
    gates = torch.sigmoid(tau * (ratios - 1)) * 4 / tau
    return -gates * advantages


def gmpo_ratios(
    differences: Tensor, advantages: Tensor, sequence_index: Tensor, num_sequences: int, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """GMPO (arXiv 2507.20673): geometric mean of the sequence's token ratios, which are clipped from above for A > 0
    and from below for A < 0; and which ones were clipped, [N]. The loss of each token is -A * ratio."""
    low, high = (math.log(bound) if bound > 0 else -math.inf for bound in clip_bounds(objective))
    x = differences.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)
    clipped_low, clipped_high = (x < low) & (advantages < 0), (x > high) & (advantages > 0)
    x = x.masked_fill(clipped_low, low).masked_fill(clipped_high, high)
    return sequence_means(x, sequence_index, num_sequences).exp(), clipped_low, clipped_high


def vespo_weights(
    differences: Tensor,
    corrections: Tensor | None,
    advantages: Tensor,
    sequence_index: Tensor,
    num_sequences: int,
    objective: Objective,
) -> Tensor:
    """VESPO (arXiv 2602.10693): constant weight w^k exp(lambda (1 - w)), where w is the sequence's ratio, [N].

    The `corrections` of the tokens are factors of w, as in TRL. The loss of each token is -A * logp * weight.
    """
    clamp = objective.log_ratio_clamp
    x = differences.detach().clamp(-clamp, clamp)
    if corrections is not None:
        x = x + corrections.log().clamp(-clamp, clamp)
    log_w = sequence_sums(x, sequence_index, num_sequences)[sequence_index].clamp(-clamp, clamp)
    is_gain = advantages >= 0
    k = torch.full_like(x, objective.vespo_k_neg).masked_fill(is_gain, objective.vespo_k_pos)
    decay = torch.full_like(x, objective.vespo_lambda_neg).masked_fill(is_gain, objective.vespo_lambda_pos)
    return (decay + k * log_w - decay * log_w.exp()).exp()


def dppo_surrogate(
    logps: Tensor, old_logps: Tensor, ratios: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """DPPO with the binary total variation (arXiv 2602.04879), negated: no clip, but 0 for a token whose probability
    has moved further than its bound in the direction of its advantage; and which ones, [N]."""
    moved = (logps.exp() - old_logps.exp()).detach()
    masked_low = (moved < -objective.clip_low) & (advantages < 0)
    masked_high = (moved > objective.clip_high) & (advantages > 0)
    return (-ratios * advantages).masked_fill(masked_low | masked_high, 0.0), masked_low, masked_high


def covariances(logps: Tensor, advantages: Tensor) -> Tensor:
    """Covariance of each token's log-prob and advantage (arXiv 2505.22617), by which its gradient lowers the entropy, a
    constant; means over all tokens, [N]."""
    logps = logps.detach()
    return (logps - logps.mean()) * (advantages - advantages.mean())


def clip_cov_surrogate(
    logps: Tensor, ratios: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip-Cov (arXiv 2505.22617), negated: the clip, and 0 for tokens drawn from those that are not clipped and whose
    covariance is within bounds; the drawn ones count as clipped high, [N]."""
    losses, clipped_low, clipped_high = clip_surrogate(ratios, advantages, objective)
    cov = covariances(logps, advantages)
    is_candidate = (cov > objective.clip_cov_low) & (cov < objective.clip_cov_high) & ~clipped_low & ~clipped_high
    candidates = is_candidate.nonzero().squeeze(1)
    # seeded by the number of candidates, so that every run draws the same tokens
    generator = torch.Generator().manual_seed(len(candidates))
    drawn = torch.randperm(len(candidates), generator=generator)[: num_selected(len(logps), objective)]
    is_drawn = torch.zeros_like(is_candidate).index_fill(0, candidates[drawn.to(candidates.device)], True)
    return losses.masked_fill(is_drawn, 0.0), clipped_low, clipped_high | is_drawn


def kl_cov_surrogate(
    logps: Tensor, old_logps: Tensor, ratios: Tensor, advantages: Tensor, objective: Objective
) -> Tensor:
    """KL-Cov (arXiv 2505.22617), negated: no clip, and a penalty |logp - old| in nats for the tokens of the largest
    covariances, [N]."""
    largest = covariances(logps, advantages).topk(min(num_selected(len(logps), objective), len(logps))).indices
    weights = torch.zeros_like(logps).index_fill(0, largest, objective.kl_cov_coef)
    return -ratios * advantages + weights * (logps - old_logps).abs()


def num_selected(num_tokens: int, objective: Objective) -> int:
    """Number of tokens that Clip-Cov draws, or that KL-Cov penalizes."""
    return max(int(objective.cov_ratio * num_tokens), 1)


def kl_penalties(logps: Tensor, ref_logps: Tensor, objective: Objective) -> Tensor:
    """Eq. 3 (k3), or k1 or k2: KL estimate of each token to the reference policy, nats, [N].

    k1 and k2 (Schulman, joschu.net/blog/kl-approx.html) have no exp that could overflow, and so no clamp.
    """
    x = ref_logps - logps
    if objective.kl == "k1":
        return -x
    if objective.kl == "k2":
        return 0.5 * x * x
    x = x.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)
    # exp(x) - x - 1; expm1 keeps the digits that exp(x) - 1 loses near x = 0
    return torch.expm1(x) - x


def rollout_weights(
    old_logps: Tensor, rollout_logps: Tensor, sequence_index: Tensor, num_sequences: int, objective: Objective
) -> Tensor:
    """Weight of each token's surrogate that corrects the mismatch between sampler and trainer, [N], a constant:
    truncated (TIS), or 0 if out of bounds (IcePop, arXiv 2510.18855), or 1 within and 0 out of bounds for the geometric
    mean over the sequence (Geo-RS, richardli.xyz/rl-collapse)."""
    differences = (old_logps - rollout_logps).detach()
    is_geometric = objective.rollout_correction == "geometric_mask"
    if is_geometric:
        differences = sequence_means(differences, sequence_index, num_sequences)
    elif objective.corrects_sequences:
        differences = sequence_sums(differences, sequence_index, num_sequences)[sequence_index]
    clamp, low, high = objective.log_ratio_clamp, objective.rollout_floor, objective.rollout_cap
    weights = differences.clamp(-clamp, clamp).exp()
    if objective.masks_rollouts:
        is_out = (weights < low) | (weights > high)
        return (torch.ones_like(weights) if is_geometric else weights).masked_fill(is_out, 0.0)
    return weights.clamp(low, high)


def surrogate_terms(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    corrections: Tensor | None,
    sequence_index: Tensor,
    num_sequences: int,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each token without the penalty, ratio, clipped low and clipped high; each [N]."""
    sequences = sequence_index, num_sequences, objective
    if objective.surrogate == "gmpo":
        ratios, clipped_low, clipped_high = gmpo_ratios(logps - old_logps, advantages, *sequences)
        losses = -ratios * advantages
    else:
        ratios = log_ratios(logps, old_logps, *sequences).exp()
        clipped_low = clipped_high = torch.zeros_like(logps, dtype=torch.bool)
    if objective.surrogate == "clip":
        losses, clipped_low, clipped_high = clip_surrogate(ratios, advantages, objective)
    elif objective.surrogate == "cispo":
        losses, clipped_low, clipped_high = cispo_surrogate(logps, ratios, advantages, objective)
    elif objective.surrogate == "sapo":
        losses = sapo_surrogate(ratios, advantages, objective)
    elif objective.surrogate == "dppo_tv":
        losses, clipped_low, clipped_high = dppo_surrogate(logps, old_logps, ratios, advantages, objective)
    elif objective.surrogate == "clip_cov":
        losses, clipped_low, clipped_high = clip_cov_surrogate(logps, ratios, advantages, objective)
    elif objective.surrogate == "kl_cov":
        losses = kl_cov_surrogate(logps, old_logps, ratios, advantages, objective)
    elif objective.surrogate == "vespo":
        weights = vespo_weights(logps - old_logps, corrections, advantages, *sequences)
        losses, corrections = -weights * advantages * logps, None
    return losses if corrections is None else losses * corrections, ratios, clipped_low, clipped_high


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
    """Loss of each valid token, -surrogate + beta * penalty (paper: J = J_clip - beta_eff E[D]), and its terms.

    `corrections` [N] are the `rollout_weights` if they are known already; else they are computed from `rollout_logps`.
    """
    # on-policy: the ratio is exactly 1, and its gradient is that of logps
    old_logps = logps.detach() if old_logps is None else old_logps
    sequences = sequence_index, num_sequences, objective
    if rollout_logps is not None:
        corrections = rollout_weights(old_logps, rollout_logps, *sequences)
    losses, ratios, clipped_low, clipped_high = surrogate_terms(logps, old_logps, advantages, corrections, *sequences)
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
    """Weight of each valid token's loss, [N], so that loss = sum(weights * losses)."""
    ones = torch.ones_like(like)
    if objective.aggregation == "none":
        return ones
    if objective.aggregation == "token":
        return ones / (max(like.numel(), 1) if normalizer is None else normalizer)
    ones = ones / (max(num_sequences, 1) if normalizer is None else normalizer)
    if objective.aggregation == "sum":
        return ones
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
    entropies: Tensor | None = None,
    entropy_bonus: Tensor | None = None,
) -> Tensor:
    """The whole loss of a padded batch, 0-dim, or [B, T] with aggregation "none": logps, mask and entropies [B, T],
    advantages [B] or [B, T]."""
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
        advantages=advantages[sequence_index] if advantages.dim() == 1 else advantages[sequence_index, position],
        beta=beta,
        sequence_index=sequence_index,
        num_sequences=num_sequences,
        objective=objective,
    )
    weights = token_weights(sequence_index, num_sequences, normalizer, tokens, objective)
    if objective.aggregation == "none":
        return torch.zeros_like(logps).index_put((sequence_index, position), terms.losses)
    loss = (weights * terms.losses).sum()
    entropies = valid(entropies)
    if entropies is None or entropy_bonus is None:
        return loss
    return loss - entropy_bonus * (weights * entropies).sum()


def akl_scale(accuracy: Tensor, rho: str) -> Tensor:
    """Eq. 8: rho(x) = (tanh(x) + 1) / 2, monotone in (0, 1); "constant" is 1, which is GRPO."""
    return (torch.tanh(accuracy) + 1) / 2 if rho == "tanh" else torch.ones_like(accuracy)


def smoothed_pass_rates(pass_rates: Tensor, new_rates: Tensor, momentum: float | Tensor) -> Tensor:
    """Eq. 6: p~ <- momentum * p~ + (1 - momentum) * the question's mean reward, [K]."""
    return momentum * pass_rates + (1 - momentum) * new_rates


def counted_momentum(visits: Tensor, momentum: float | Tensor) -> Tensor:
    """Ours, not the paper's: momentum of eq. 6 after that many visits, [K]. It makes p~ the mean of the first
    1 / (1 - momentum) visits and the moving average afterwards; the first visit replaces p~."""
    return (visits / (visits + 1)).clamp(max=momentum)


def beta_posterior(pass_rates: Tensor, visits: Tensor, momentum: float, group_size: int) -> tuple[Tensor, Tensor]:
    """The parameters of MoPPS' Beta posterior of each pass rate, [Q] float64 each, with a uniform prior: p~ counts as
    the share of right replies in the last 1 / (1 - momentum) visits, or in all of them if there were fewer.

    Source: MoPPS (arXiv 2507.04632), whose counts decay in place of p~'s moving average.
    """
    replies = group_size * visits.double().clamp(max=1 / (1 - momentum))
    return 1 + replies * pass_rates, 1 + replies * (1 - pass_rates)


def log_curriculum_weights(pass_rates: Tensor, mean: float, std: float) -> Tensor:
    """Eq. 7: log w = -(p~ - mean)^2 / (2 std^2), [Q]; in logs because w underflows for a small std."""
    return -((pass_rates - mean) ** 2) / (2 * std**2)
