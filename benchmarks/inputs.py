"""Random inputs of a case, and the loss of all contenders in eager PyTorch.

The loss is GRPO's: the surrogate clipped at 0.2, the k3 penalty with beta = 0.02, averaged per sequence, then over
sequences. Logits have a standard deviation of 2; old and reference log-probs differ from the current ones by 0.1 nats
(standard deviation), so that some tokens are clipped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import TINY, Case

BETA, CLIP = 0.02, 0.2
LOGIT_STD = 2.0  # of the random logits
LOG_RATIO_STD = 0.1  # nats


@dataclass
class Inputs:
    """The tensors of one call: hidden [B, T, H], weight [V, H]; ids, mask, old and ref logps [B, T]; advantages [B]."""

    case: Case
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logps: Tensor
    ref_logps: Tensor

    @property
    def ids_or_ignored(self) -> Tensor:
        """`ids` with -100 where masked."""
        return self.ids.masked_fill(~self.mask, -100)

    def clear(self) -> None:
        """Clears the gradients."""
        self.hidden.grad = self.weight.grad = None


def make_inputs(case: Case, device: torch.device, seed: int = 0, log_ratio_std: float = LOG_RATIO_STD) -> Inputs:
    """Random inputs, or a language model's if the case has a temperature; equal for equal case, device and seed."""
    if case.temperature is not None and case.shape != TINY:
        from benchmarks.sampled_inputs import sampled_inputs

        return sampled_inputs(case, device)
    shape, dtype = case.shape, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    size = (shape.num_sequences, shape.length)
    hidden = normal(*size, shape.hidden_size).to(dtype)
    weight = normal(shape.vocab_size, shape.hidden_size).mul_(LOGIT_STD / shape.hidden_size**0.5).to(dtype)
    ids = torch.randint(shape.vocab_size, size, generator=generator, device=device)
    mask = torch.rand(size, generator=generator, device=device) < case.active_share
    mask[:, 0] = True
    with torch.no_grad():
        logps = torch.stack([chosen_logps(row @ weight.T, chosen) for row, chosen in zip(hidden, ids, strict=True)])
    return Inputs(
        case=case,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not case.frozen_head),
        ids=ids,
        mask=mask,
        advantages=normal(shape.num_sequences),
        old_logps=logps + log_ratio_std * normal(*size),
        ref_logps=logps + log_ratio_std * normal(*size),
    )


def chosen_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of `ids` [T] in float32, from logits [T, V]."""
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def policy_loss(logps: Tensor, inputs: Inputs, beta: float = BETA) -> Tensor:
    """The loss of log-probs [B, T] in eager PyTorch."""
    mask, advantages = inputs.mask, inputs.advantages.to(logps.dtype)[:, None]
    log_ratio = torch.where(mask, logps - inputs.old_logps, 0.0)
    if inputs.case.ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    drift = torch.where(mask, inputs.ref_logps - logps, 0.0)
    losses = (beta * (drift.exp() - drift - 1) - surrogate).masked_fill(~mask, 0.0)
    return (losses.sum(1) / mask.sum(1)).mean()


def cross_entropy(logps: Tensor, inputs: Inputs) -> Tensor:
    """The mean cross-entropy of the unmasked tokens, for contenders that fuse a cross-entropy but no policy loss."""
    return -logps.masked_fill(~inputs.mask, 0.0).sum() / inputs.mask.sum()
