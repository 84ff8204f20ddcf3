"""Training batches: samples into one mini-batch per optimizer step, and each rank's share of it into micro-batches.

Every rank holds all samples of a step and takes its share of them, so each rank knows the denominators of the means
without communication, before the first backward pass. Neither the number of ranks nor the size of micro-batches changes
the optimizer step.

Letters: B sequences, S positions of the longest, N positions in total. Tensors are aligned to the position that
PREDICTS a token: at position s the model has read `input_ids[:, :s + 1]` and `completion_ids[:, s]` is the next token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.runtime.distributed import Ranks
from expo.types import Sample


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a forward pass.

    Padded: input_ids [B, S] int64, padded on the right, where causal attention never looks, so no attention mask is
    needed; completion_ids [B, S] int64, the token after each position; completion_mask [B, S] bool, True where that
    token belongs to the reply.
    Packed: input_ids [1, N] and position_ids [1, N], which restart at 0 with every sequence; completion_ids and
    completion_mask [N]; cu_seqlens [B + 1] int32, the cumulative sequence lengths.
    completion_lengths [B] int64 stays on the CPU: the reply tokens of each sequence, for which the loss need not wait.
    """

    input_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    completion_lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch with all tensors but `completion_lengths` on `device`."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        moved = {name: value.to(device) for name, value in tensors.items() if name != "completion_lengths"}
        return replace(self, **moved)


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward-backward pass.

    advantages: [B] float32; rollout_logps: [B, S] (packed: [N]) float32 nats, from the rollout engine at sampling time;
    old_logps: the same shape, or None if the policy has not been updated since sampling; ref_logps: the same shape, or
    None without a reference policy.
    """

    batch: Batch
    advantages: Tensor
    rollout_logps: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None


@dataclass(frozen=True)
class MiniBatch:
    """The input of one optimizer step: this rank's micro-batches, and the sizes of the whole step over all ranks."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int  # of replies
    num_trained_tokens: int  # of those in micro-batches
    lengths: list[int]  # tokens of every sequence in micro-batches, prompt and reply
    num_positions: int  # padding included, over all ranks


# --- samples into mini-batches and micro-batches


def mini_batches(
    samples: Sequence[Sample],
    section: PolicySection,
    pad_id: int,
    ranks: Ranks,
    *,
    skips_zero_advantages: bool = False,
) -> Iterator[MiniBatch]:
    """Splits all ranks' `samples` in order into equal mini-batches, one per update; no old or reference logps.

    `skips_zero_advantages`: samples whose advantage is 0 are in no micro-batch; the sizes of the step count them.
    """
    size = len(samples) // section.updates_per_step
    for start in range(0, len(samples), size):
        part = [sample for sample in samples[start : start + size] if not sample.is_left_out]
        trained = [sample for sample in part if sample.advantage != 0] if skips_zero_advantages else part
        yield _mini_batch(part, trained, section, pad_id, ranks)


def _num_reply_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.reply_ids) for sample in samples)


def _mini_batch(
    samples: Sequence[Sample], trained: Sequence[Sample], section: PolicySection, pad_id: int, ranks: Ranks
) -> MiniBatch:
    lengths = [len(sample) for sample in trained]
    rows_by_rank = _split_over_ranks(lengths, section, ranks.size)
    own_samples = [[trained[row] for row in rows] for rows in rows_by_rank[ranks.rank]]
    num_positions = [_num_positions([lengths[row] for row in rows], section) for part in rows_by_rank for rows in part]
    return MiniBatch(
        micro_batches=[_micro_batch(part, section, pad_id, ranks.device) for part in own_samples],
        num_sequences=len(samples),
        num_tokens=_num_reply_tokens(samples),
        num_trained_tokens=_num_reply_tokens(trained),
        lengths=lengths,
        num_positions=sum(num_positions),
    )


def _split_over_ranks(lengths: Sequence[int], section: PolicySection, num_ranks: int) -> list[list[list[int]]]:
    """Row numbers by rank and micro-batch. All ranks have the same number of micro-batches, some of them empty, since
    a pass may be a collective operation. There is at least one, so that an optimizer step without samples runs too.
    """
    split = []
    for rows in split_evenly(lengths, num_ranks):
        groups = split_by_tokens([lengths[row] for row in rows], section.micro_batch_tokens, padded=not section.packing)
        split.append([[rows[index] for index in group] for group in groups])
    count = max(1, *(len(groups) for groups in split))
    return [groups + [[]] * (count - len(groups)) for groups in split]


def _num_positions(lengths: Sequence[int], section: PolicySection) -> int:
    """Positions in a micro-batch of these sequences, padding included."""
    return sum(lengths) if section.packing else len(lengths) * max(lengths, default=0)


def _micro_batch(samples: Sequence[Sample], section: PolicySection, pad_id: int, device: torch.device) -> MicroBatch:
    # an empty micro-batch has one token, which the mask excludes
    prompts, replies = [s.prompt_ids for s in samples] or [[pad_id]], [s.reply_ids for s in samples] or [[]]
    cpu = torch.device("cpu")
    batch = pack(prompts, replies, cpu) if section.packing else collate(prompts, replies, pad_id, cpu)
    rollout_logps = torch.zeros(batch.completion_mask.shape)
    rollout_logps[batch.completion_mask] = torch.tensor([logp for sample in samples for logp in sample.rollout_logps])
    advantages = torch.tensor([sample.advantage for sample in samples] or [0.0])
    return MicroBatch(batch.to(device), advantages.to(device), rollout_logps.to(device))


def split_by_tokens(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Row numbers of micro-batches of at most `budget` tokens: rows times longest row if `padded`, else their sum.

    Rows are sorted by length to keep the padding small; a row longer than the budget is a micro-batch of its own.
    """
    groups: list[list[int]] = []
    num_tokens = 0  # of the last group
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        num_tokens += lengths[groups[-1][0]] if groups and padded else lengths[row]
        if groups and num_tokens <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            num_tokens = lengths[row]
    return groups


def split_evenly(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Row numbers of each share, with about equal token counts: the longest row goes first, each row to the share that
    has the fewest tokens so far.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    num_tokens = [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        smallest = num_tokens.index(min(num_tokens))
        shares[smallest].append(row)
        num_tokens[smallest] += lengths[row]
    return shares


# --- token ids into tensors


def collate(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Batch:
    """A batch of prompts with their replies, padded to the longest sequence."""
    lengths = [len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    input_ids = torch.full((len(lengths), max(lengths)), pad_id, dtype=torch.int64)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor([*prompt, *reply])
    position = torch.arange(max(lengths))
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    ends = torch.tensor(lengths)[:, None]
    completion_mask = (position >= starts) & (position < ends - 1)
    return Batch(
        input_ids=input_ids,
        completion_ids=torch.roll(input_ids, -1, dims=1),
        completion_mask=completion_mask,
        completion_lengths=completion_mask.sum(1),
    ).to(device)


def pack(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """A batch of prompts with their replies, concatenated without padding."""
    cpu = torch.device("cpu")
    sequences = [collate([prompt], [reply], 0, cpu) for prompt, reply in zip(prompts, replies, strict=True)]
    lengths = [sequence.input_ids.shape[1] for sequence in sequences]
    return Batch(
        input_ids=torch.cat([sequence.input_ids for sequence in sequences], dim=1),
        completion_ids=torch.cat([sequence.completion_ids[0] for sequence in sequences]),
        completion_mask=torch.cat([sequence.completion_mask[0] for sequence in sequences]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        completion_lengths=torch.tensor([int(sequence.completion_mask.sum()) for sequence in sequences]),
    ).to(device)
