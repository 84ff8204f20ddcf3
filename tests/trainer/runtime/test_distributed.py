"""What the ranks exchange: tensors that come back bit for bit, from two ranks and from one."""

import os

import pytest
import torch

from expo.errors import ConfigError
from expo.runtime.distributed import Ranks, use_device
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


ERRORS_OF_TWO_RANKS = """
import torch
from expo.errors import ConfigError, ExpoError
from expo.learner.model_checks import check_same_weights
from expo.runtime.distributed import join_ranks, leave_ranks

found = {}
ranks = join_ranks("cpu", 60, found.update)
assert sorted(found) == [0, 1] and found[0] != found[1]

def raised(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)

def fail_on(rank, error):
    if ranks.rank == rank:
        raise error
    return "fine"

assert ranks.raise_on_all_ranks(lambda: "fine") == "fine"
found = raised(lambda: ranks.raise_on_all_ranks(lambda: fail_on(1, ConfigError("no file"))))
assert found == (ConfigError, "rank 1: no file"), found
found = raised(lambda: ranks.raise_on_all_ranks(lambda: fail_on(1, KeyError("a"))))
assert found == ((KeyError, "'a'") if ranks.rank == 1 else (ExpoError, "rank 1 failed: KeyError: 'a'")), found

same = {"model": "a", "lr": "1"}
assert raised(lambda: ranks.require_equal(same, "repair it")) is None
found = raised(lambda: ranks.require_equal({**same, "lr": str(ranks.rank)}, "repair it"))
assert found == (ConfigError, "the ranks differ in lr: 1 on rank 1, 0 on rank 0; repair it"), found
found = raised(lambda: ranks.require_equal({**same, "lr": "2", "file": "3"} if ranks.rank else same, "repair it"))
assert found == (ConfigError, "the ranks differ in lr and in 1 more: 2 on rank 1, 1 on rank 0; repair it"), found

model = torch.nn.Linear(3, 4)
with torch.no_grad():
    model.weight.fill_(0.5), model.bias.fill_(0.25)
assert raised(lambda: check_same_weights("here", model, ranks)) is None
with torch.no_grad():
    model.bias[2] += ranks.rank * 1e-7
kind, message = raised(lambda: check_same_weights("here", model, ranks))
assert kind is ConfigError and message.startswith("the ranks differ in the weights bias: sum "), message
leave_ranks()
"""


def test_two_ranks_raise_the_error_of_one_and_name_what_differs(tmp_path):
    run_on_two_ranks(tmp_path, ERRORS_OF_TWO_RANKS)


def test_of_many_ranks_the_few_that_differ_are_named(monkeypatch):
    ranks = Ranks(torch.device("cpu"), 0, 5)
    values = ["a", "b", "b", "a", "b"]
    monkeypatch.setattr(ranks, "gather", lambda given: values if isinstance(given, str) else [{"x": v} for v in values])
    with pytest.raises(ConfigError, match=r"the ranks differ in x: a on ranks 0, 3, b on ranks 1, 2, 4; look"):
        ranks.require_equal({"x": "a"}, "look")


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
        assert use_device(name) == torch.device("cuda", expected)
        assert device.current == expected
    assert os.environ["LOCAL_RANK"] == str(expected)  # the GPU that DeepSpeed takes


def test_one_gpu_for_several_ranks_is_refused(monkeypatch):
    for sizes in ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}):
        set_ranks(monkeypatch, {"LOCAL_RANK": "1", **sizes})
        with fake_cuda(), pytest.raises(ConfigError, match="is one GPU for the 2 ranks of this machine"):
            use_device("cuda:0")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_where_there_is_none_is_refused(monkeypatch, name):
    set_ranks(monkeypatch, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"run.device = {name} cannot be used here: PyTorch finds no GPU"):
        use_device(name)


def set_ranks(monkeypatch, ranks):
    """The environment of one rank; `monkeypatch` restores it, whatever is set meanwhile."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, ranks.get(name, ""))
        if name not in ranks:
            monkeypatch.delenv(name)
