"""What one optimizer step reads: its samples, shared out to the ranks and cut into micro-batches.

Every rank is given all samples of a step and takes its share, so the denominators of means are known to each without
asking, before the first backward pass; neither the number of ranks nor how micro-batches are cut changes the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.learner.batch import Batch, collate, pack, share_by_tokens, split_by_tokens
from expo.runtime.distributed import Ranks
from expo.types import Sample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward-backward pass reads.

    advantages: [B] float32; rollout_logps: [B, S] (packed: [N]) float32 nats, what the rollout engine said when it
    sampled; old_logps: the same shape, or None where the policy has not moved since it sampled; ref_logps: the same
    shape, or None without a reference policy.
    """

    batch: Batch
    advantages: Tensor
    rollout_logps: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step reads: this rank's micro-batches, and the sizes of the whole step over all ranks."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int  # of replies
    lengths: list[int]  # tokens of every sequence, prompt and reply
    num_positions: int  # with padding, over all ranks


def mini_batches(samples: Sequence[Sample], section: PolicySection, pad_id: int, ranks: Ranks) -> Iterator[MiniBatch]:
    """All ranks' `samples` in equal parts, in the order given: one an update, with no log-probs of a policy yet."""
    size = len(samples) // section.updates_per_step
    for start in range(0, len(samples), size):
        part = [sample for sample in samples[start : start + size] if not sample.is_left_out]
        yield _mini_batch(part, section, pad_id, ranks)


def _mini_batch(samples: Sequence[Sample], section: PolicySection, pad_id: int, ranks: Ranks) -> MiniBatch:
    lengths = [len(sample) for sample in samples]
    plan = _plan(lengths, section, ranks.size)
    mine = [[samples[row] for row in rows] for rows in plan[ranks.rank]]
    return MiniBatch(
        micro_batches=[_micro_batch(part, section, pad_id, ranks.device) for part in mine],
        num_sequences=len(samples),
        num_tokens=sum(len(sample.reply_ids) for sample in samples),
        lengths=lengths,
        num_positions=sum(_positions([lengths[row] for row in rows], section) for share in plan for rows in share),
    )


def _plan(lengths: Sequence[int], section: PolicySection, num_ranks: int) -> list[list[list[int]]]:
    """Row numbers by rank and micro-batch; all ranks have as many micro-batches, empty ones if need be, since each
    pass may be a collective. There is one at least: a step is taken even where nothing is learnt.
    """
    plan = []
    for rows in share_by_tokens(lengths, num_ranks):
        groups = split_by_tokens([lengths[row] for row in rows], section.micro_batch_tokens, padded=not section.packing)
        plan.append([[rows[index] for index in group] for group in groups])
    count = max(1, *(len(groups) for groups in plan))
    return [groups + [[]] * (count - len(groups)) for groups in plan]


def _positions(lengths: Sequence[int], section: PolicySection) -> int:
    """Positions that a micro-batch of these sequences takes up."""
    return sum(lengths) if section.packing else len(lengths) * max(lengths, default=0)


def _micro_batch(samples: Sequence[Sample], section: PolicySection, pad_id: int, device: torch.device) -> MicroBatch:
    # a rank with nothing to do passes one token that does not count
    prompts, replies = [s.prompt_ids for s in samples] or [[pad_id]], [s.reply_ids for s in samples] or [[]]
    batch = pack(prompts, replies, device) if section.packing else collate(prompts, replies, pad_id, device)
    rollout_logps = torch.zeros(batch.completion_mask.shape, device=device)
    said = [logp for sample in samples for logp in sample.rollout_logps]
    rollout_logps[batch.completion_mask] = torch.tensor(said, device=device)
    advantages = torch.tensor([sample.advantage for sample in samples] or [0.0], device=device)
    return MicroBatch(batch, advantages, rollout_logps)
