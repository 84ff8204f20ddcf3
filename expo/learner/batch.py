"""Tensors of a training batch: prompts and replies side by side, padded on the right or packed end to end.

Letters: B sequences, S positions of the longest, N positions in all. Everything is aligned to the position that
PREDICTS a token: at position s the model has read `input_ids[:, :s + 1]` and `completion_ids[:, s]` is what came next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a forward pass.

    Padded: input_ids [B, S] int64, padded on the right, where causal attention never looks: no attention mask is
    needed; completion_ids [B, S] int64, the token after each position; completion_mask [B, S] bool, True where that
    token belongs to the reply.
    Packed: input_ids [1, N] and position_ids [1, N], which start again at 0 with every sequence; completion_ids and
    completion_mask [N]; cu_seqlens [B + 1] int32, where each sequence starts.
    """

    input_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None


def collate(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Batch:
    """One batch of prompts with their replies, padded to the longest sequence."""
    lengths = [len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    input_ids = torch.full((len(lengths), max(lengths)), pad_id, dtype=torch.int64)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor([*prompt, *reply])
    position = torch.arange(max(lengths))
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    ends = torch.tensor(lengths)[:, None]
    return Batch(
        input_ids=input_ids.to(device),
        completion_ids=torch.roll(input_ids, -1, dims=1).to(device),
        completion_mask=((position >= starts) & (position < ends - 1)).to(device),
    )


def pack(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """One batch of prompts with their replies, laid end to end."""
    alone = [collate([prompt], [reply], 0, torch.device("cpu")) for prompt, reply in zip(prompts, replies, strict=True)]
    lengths = [one.input_ids.shape[1] for one in alone]
    return Batch(
        input_ids=torch.cat([one.input_ids for one in alone], dim=1).to(device),
        completion_ids=torch.cat([one.completion_ids[0] for one in alone]).to(device),
        completion_mask=torch.cat([one.completion_mask[0] for one in alone]).to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
    )


def split_by_tokens(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Row numbers of micro-batches of at most `budget` tokens: rows times longest row, or their sum where not `padded`.

    Rows are taken in order of length, so that little is padded; a row longer than the budget is a batch of its own.
    """
    groups: list[list[int]] = []
    held = 0  # tokens of the last group
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        held += lengths[groups[-1][0]] if groups and padded else lengths[row]
        if groups and held <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            held = lengths[row]
    return groups


def share_by_tokens(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Row numbers for each of the shares, so that their tokens are about equal: the longest rows first, each to the
    share that has least.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    held = [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        least = held.index(min(held))
        shares[least].append(row)
        held[least] += lengths[row]
    return shares
