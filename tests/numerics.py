"""Helpers of the kernel tests: inputs, error measures, and an oracle written independently of `reference.py`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_kernels import Objective


@dataclass
class Batch:
    """Random inputs of one call, float64 unless cast: B sequences, T positions, H hidden, V vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    advantages: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    rollout_logps: Tensor

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T + self.bias

    def loss_inputs(self, objective: Objective) -> dict[str, Tensor]:
        named = {"advantages": self.advantages, "old_logps": self.old_logps, "ref_logps": self.ref_logps}
        return named | ({} if objective.rollout_correction is None else {"rollout_logps": self.rollout_logps})


def make_batch(B=4, T=6, H=8, V=13, *, dtype=torch.float64, seed=0, spread=0.4) -> Batch:
    """Log-probs of the other policies differ from the current ones by about `spread` nats, so that some ratios clip."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(B, T, H), normal(V, H) / math.sqrt(H), 0.1 * normal(V)
    hidden, weight, bias = (tensor.to(dtype).double() for tensor in (hidden, weight, bias))
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, 0] = True
    logps = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, ids[..., None]).squeeze(-1)
    others = [logps + spread * normal(B, T) for _ in range(3)]
    return Batch(
        *(tensor.to(dtype) for tensor in (hidden, weight, bias)),
        ids,
        mask,
        normal(B),
        *(tensor if dtype == torch.float64 else tensor.float() for tensor in others),
    )


def relative_error(tensor: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference, divided by that of the truth."""
    return float((tensor.double() - truth.double()).norm() / truth.double().norm())


def oracle_loss(logps, mask, advantages, old, ref, rollout, beta, o: Objective, normalizer=None) -> Tensor:
    """The loss by the papers' formulas, token by token in Python, for padded float64 inputs; differentiable in
    `logps`."""
    total, tokens = logps.sum() * 0.0, int(mask.sum())
    for b in range(logps.shape[0]):
        valid = [t for t in range(logps.shape[1]) if bool(mask[b, t])]
        if not valid:
            continue
        a, clamp = advantages[b], o.log_ratio_clamp
        drift = {t: logps[b, t] - (logps[b, t].detach() if old is None else old[b, t]) for t in valid}
        mean_drift = sum(drift.values()) / len(valid)
        losses = []
        for t in valid:
            r = torch.exp((drift[t] if o.ratio == "token" else mean_drift).clamp(-clamp, clamp))
            if o.surrogate == "clip":
                now = float(r.detach())
                kept = min(max(now, 1 - o.clip_low), 1 + o.clip_high)
                clipped = r if kept == now else torch.tensor(kept, dtype=r.dtype)
                loss = -r * a if now * float(a) <= kept * float(a) else -clipped * a
                if o.dual_clip is not None and a < 0 and float(loss.detach()) > -o.dual_clip * float(a):
                    loss = -o.dual_clip * a
            elif o.surrogate == "cispo":
                loss = -min(max(float(r.detach()), 1 - o.clip_low), 1 + o.clip_high) * a * logps[b, t]
            else:
                tau = o.sapo_tau_pos if a > 0 else o.sapo_tau_neg
                loss = -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * a
            if rollout is not None:
                gaps = [float((old if old is not None else logps.detach())[b, s] - rollout[b, s]) for s in valid]
                gap = sum(gaps) if o.rollout_correction == "sequence" else gaps[valid.index(t)]
                loss = loss * min(math.exp(gap), o.rollout_cap)
            if ref is not None:
                x = ref[b, t] - logps[b, t]
                z = x.clamp(-clamp, clamp)
                kl = {"k1": -x, "k2": x * x / 2, "k3": torch.exp(z) - z - 1}[o.kl]
                loss = loss + beta * kl * (torch.exp(drift[t]) if o.kl_importance_weighted else 1.0)
            losses.append(loss)
        divisor = {"sequence": len(valid), "token": 1, "constant": o.max_completion_length}[o.aggregation]
        total = total + sum(losses) / divisor
    default = tokens if o.aggregation == "token" else logps.shape[0]
    return total / (default if normalizer is None else normalizer)
