"""Batches without a model: alignment, masks, splitting by a token budget, and the sizes of an optimizer step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expo.config import PolicySection
from expo.learner.batch import collate, mini_batches, split_by_tokens
from expo.runtime.distributed import Ranks
from expo.types import Sample

# prompt and reply tokens
LENGTHS = [(9, 14), (4, 7), (6, 1), (3, 25), (5, 5), (8, 12)] * 2


def test_positions_predict_the_next_token():
    batch = collate([[1, 2, 3], [4]], [[7, 8], [9]], pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8], [4, 9, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [
        [False, False, True, True, False],
        [True, False, False, False, False],
    ]
    assert batch.completion_ids[batch.completion_mask].tolist() == [7, 8, 9]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_and_fit_the_budget(lengths, budget):
    groups = split_by_tokens(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget


def samples(num_left_out=0):
    return [
        Sample([5] * prompt, [6] * reply, [-0.5] * reply, advantage=1.0, is_left_out=row < num_left_out)
        for row, (prompt, reply) in enumerate(LENGTHS)
    ]


def mini_batches_of(data, rank=0, size=1, **section):
    return list(mini_batches(data, PolicySection(**section), 0, Ranks(torch.device("cpu"), rank, size)))


def test_replies_left_out_keep_their_place_among_the_mini_batches():
    found = mini_batches_of(samples(num_left_out=5), updates_per_step=2)
    assert [mini_batch.num_sequences for mini_batch in found] == [1, 6]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_sizes_of_a_step_are_those_of_its_samples_on_all_ranks(packing, size):
    data, options = samples(), {"updates_per_step": 1, "micro_batch_tokens": 64, "packing": packing}
    by_rank = [mini_batches_of(data, rank, size, **options)[0] for rank in range(size)]
    masks = [micro.batch.completion_mask for mini_batch in by_rank for micro in mini_batch.micro_batches]
    for mini_batch in by_rank:
        assert mini_batch.num_tokens == sum(int(mask.sum()) for mask in masks) == sum(len(s.reply_ids) for s in data)
        assert mini_batch.num_sequences == 12
        assert mini_batch.num_positions == sum(mask.numel() for mask in masks) >= sum(mini_batch.lengths)
        assert len(mini_batch.micro_batches) == len(by_rank[0].micro_batches)
