"""What the ranks exchange: tensors that come back bit for bit, from two ranks and from one."""

import pytest
import torch

from expo.runtime.distributed import Ranks
from tests.trainer.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.medium

TENSORS_OF_TWO_RANKS = """
import torch
from expo.runtime.distributed import join_ranks, leave_ranks

ranks = join_ranks("cpu", 60)

def is_same(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)

nan, inf = float("nan"), float("inf")
for ours, theirs in [
    (torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([-4], dtype=torch.int32)),
    (torch.tensor([]), torch.tensor([2.5])),
    (torch.tensor([1.0]), torch.tensor([])),
    (torch.tensor([], dtype=torch.bool), torch.tensor([], dtype=torch.bool)),
    (torch.tensor([True, False]), torch.tensor([False])),
    (torch.arange(256, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)),
    (torch.arange(3), torch.arange(2**40, 2**40 + 4)),
]:
    found = ranks.all_gather_tensor(ours if ranks.is_rank0 else theirs)
    assert len(found) == 2
    assert is_same(found[0], ours) and is_same(found[1], theirs), found

special = torch.tensor([nan, inf, -inf, -0.0, 0.1, 5e-324], dtype=torch.float64)
for found in ranks.all_gather_tensor(special):
    assert is_same(found.view(torch.int64), special.view(torch.int64)), found

sent = [special, torch.empty(0, 4), torch.tensor([[True], [False]]), torch.arange(3, dtype=torch.int32)]
found = ranks.broadcast_tensors_from_rank0(sent if ranks.is_rank0 else [])
assert is_same(found[0].view(torch.int64), special.view(torch.int64))
assert all(is_same(one, other) for one, other in zip(found[1:], sent[1:], strict=True)), found
leave_ranks()
"""


def test_two_ranks_exchange_tensors_bit_for_bit(tmp_path):
    run_on_two_ranks(tmp_path, TENSORS_OF_TWO_RANKS)


def test_one_rank_has_its_own_tensors():
    ranks, values = Ranks(torch.device("cpu"), 0, 1), torch.arange(3)
    (gathered,) = ranks.all_gather_tensor(values)
    (broadcast,) = ranks.broadcast_tensors_from_rank0([values])
    assert torch.equal(gathered, values)
    assert torch.equal(broadcast, values)
