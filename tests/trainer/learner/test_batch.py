"""Batches: alignment, masks, and cutting by a token budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from expo.learner.batch import collate, split_by_tokens


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
