"""Inputs of the golden losses: computed from whole numbers, so that their bits are equal on every machine."""

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 2**10  # log-probs of the other policies are multiples of 1 / GRID nats: no library's exp shows in them


@dataclass(frozen=True)
class Batch:
    """B sequences, T positions, H hidden, V vocabulary; the last sequence has no valid token."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    advantages: Tensor  # [B]
    token_advantages: Tensor  # [B, T]
    rewards: Tensor  # [B]
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]
    rollout_logps: Tensor  # [B, T]
    logps: Tensor  # [B, T], near those of the logits

    @property
    def logits(self) -> Tensor:
        """[B, T, V], exact sums of products of small whole numbers, so equal on every machine."""
        return (self.hidden.double() @ self.weight.double().T + self.bias.double()).to(self.hidden.dtype)


def make_batch(B: int, T: int, H: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """A batch whose other policies differ from the current one by about 0.4 nats, so that some ratios are clipped.

    Masked positions hold NaN, infinities and ids out of range, which must not change any result.
    """
    generator = torch.Generator().manual_seed(seed)

    def bell(*shape: int, std: float = 1.0, grid: int = GRID) -> Tensor:
        """Multiples of 1 / grid with a nearly normal distribution: sums of four uniform whole numbers."""
        total = torch.randint(-1000, 1001, (4, *shape), generator=generator).sum(0).double()
        return (total * (std / 1154.7) * grid).round() / grid

    # 1 / 16: bfloat16 holds them without rounding, and sums of their products are exact in float64
    hidden, weight, bias = (bell(*shape, grid=16) for shape in ((B, T, H), (V, H), (V,)))
    weight = weight / 2
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.randint(0, 10, (B, T), generator=generator) < 7
    mask[:, 0] = True
    mask[-1] = False
    logps = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, ids[..., None]).squeeze(-1)
    logps, *others = ((logps + std * bell(B, T)) * GRID for std in (0.0, 0.4, 0.4, 0.4))
    logps, old, ref, rollout = ((each.round() / GRID) for each in (logps, *others))
    advantages, token_advantages = bell(B), bell(B, T)
    rewards = torch.randint(0, 2, (B,), generator=generator).double()
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    masked = ~mask
    hidden[masked] = float("nan")
    old[masked], ref[masked], rollout[masked] = float("inf"), float("-inf"), float("nan")
    ids[masked] = -100
    per_token = (value.to(narrow) for value in (advantages, token_advantages, rewards, old, ref, rollout, logps))
    return Batch(hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids, mask, *per_token)


def packed(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The valid tokens of every per-position tensor, one after the other, and cu_seqlens; one sequence is empty."""
    named = ("hidden", "logits", "ids", "mask", "old_logps", "ref_logps", "rollout_logps", "logps", "token_advantages")
    lengths = batch.mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return {name: getattr(batch, name)[batch.mask] for name in named}, cu_seqlens
