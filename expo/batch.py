"""Tensors of a training batch: prompts and replies side by side, right-padded.

Letters: B sequences, S positions. Everything is aligned to the position that PREDICTS a token: at position s the
model has read `input_ids[:, :s + 1]` and `completion_ids[:, s]` is what came next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a forward pass.

    input_ids: [B, S] int64, padded on the right, where causal attention never looks: no attention mask is needed;
    completion_ids: [B, S] int64, the token after each position;
    completion_mask: [B, S] bool, True where that token belongs to the reply.
    """

    input_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor


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


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers of micro-batches whose padded size, rows times longest row, fits `budget` tokens.

    Rows are taken in order of length, so that little is padded; a row longer than the budget is a batch of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
