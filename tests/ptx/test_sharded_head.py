"""A head that is sharded over the vocabulary, on a group of one rank, as PTX against float64."""

import os

import pytest
import torch
from torch import distributed as dist

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, TOKEN_LEVEL
from tests.ptx.checks import IN_TWO_ORDERS, check_linear_loss, no_errors

pytestmark = pytest.mark.medium  # compiles and emulates kernels


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [TOKEN_LEVEL["rollout"], SEQUENCE_LEVEL["gspo"]], ids=["token", "sequence"])
def test_loss_and_gradients(group, objective, dtype):
    with no_errors(schedules=IN_TWO_ORDERS) as report:
        check_linear_loss(V=1000, dtype=dtype, objective=objective, entropy_bonus=0.2, vocab_group=group)
    assert {"read_shard_kernel", "combine_shards_kernel"} <= set(report.launches)
