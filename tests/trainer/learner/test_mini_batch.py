"""Mini-batches without a model: which samples they hold, and what their sizes say."""

import pytest
import torch

from expo.config import PolicySection
from expo.learner.mini_batch import mini_batches
from expo.runtime.distributed import Ranks
from expo.types import Sample

# prompt and reply tokens
LENGTHS = [(9, 14), (4, 7), (6, 1), (3, 25), (5, 5), (8, 12)] * 2


def samples(num_left_out=0):
    return [
        Sample([5] * prompt, [6] * reply, [-0.5] * reply, advantage=1.0, is_left_out=row < num_left_out)
        for row, (prompt, reply) in enumerate(LENGTHS)
    ]


def made_of(data, rank=0, size=1, **section):
    return list(mini_batches(data, PolicySection(**section), 0, Ranks(torch.device("cpu"), rank, size)))


def test_replies_left_out_keep_their_place_among_the_mini_batches():
    found = made_of(samples(num_left_out=5), updates_per_step=2)
    assert [mini_batch.num_sequences for mini_batch in found] == [1, 6]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_sizes_of_a_step_are_those_of_its_samples_on_all_ranks(packing, size):
    data, options = samples(), {"updates_per_step": 1, "micro_batch_tokens": 64, "packing": packing}
    parts = [made_of(data, rank, size, **options)[0] for rank in range(size)]
    masks = [micro.batch.completion_mask for part in parts for micro in part.micro_batches]
    for part in parts:
        assert part.num_tokens == sum(int(mask.sum()) for mask in masks) == sum(len(s.reply_ids) for s in data)
        assert part.num_sequences == 12
        assert part.num_positions == sum(mask.numel() for mask in masks) >= sum(part.lengths)
        assert len(part.micro_batches) == len(parts[0].micro_batches)
