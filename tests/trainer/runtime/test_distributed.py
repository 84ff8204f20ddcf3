"""What the ranks exchange: tensors that come back bit for bit, from two ranks and from one."""

import os

import pytest
import torch

from expo.errors import ConfigError
from expo.runtime.distributed import Ranks, _device
from tests.kernels.fake_cuda import fake_cuda
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


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("cuda", {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1),
        ("auto", {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1),
        ("cuda", {}, 0),
        ("cuda:1", {}, 1),
        ("cuda:1", {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, 1),
    ],
)
def test_each_rank_has_its_own_gpu_which_is_the_current_one(monkeypatch, name, ranks, expected):
    set_ranks(monkeypatch, ranks)
    with fake_cuda() as device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert _device(name) == torch.device("cuda", expected)
        assert device.current == expected
    assert os.environ["LOCAL_RANK"] == str(expected)  # the GPU that DeepSpeed takes


def test_one_gpu_for_several_ranks_is_refused(monkeypatch):
    for sizes in ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}):
        set_ranks(monkeypatch, {"LOCAL_RANK": "1", **sizes})
        with fake_cuda(), pytest.raises(ConfigError, match="is one GPU for the 2 ranks of this machine"):
            _device("cuda:0")


def set_ranks(monkeypatch, ranks):
    """The environment of one rank; `monkeypatch` restores it, whatever is set meanwhile."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, ranks.get(name, ""))
        if name not in ranks:
            monkeypatch.delenv(name)
