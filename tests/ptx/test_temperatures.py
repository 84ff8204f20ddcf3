"""Temperatures by token, as PTX: every kernel that reads them, against float64."""

import os

import pytest
import torch
from torch import distributed as dist

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels import Objective
from tests.kernels.interpreter import check_exponentials as rows
from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, some_temperatures
from tests.ptx.checks import (
    IN_EVERY_ORDER,
    IN_TWO_ORDERS,
    check_linear_logps,
    check_linear_loss,
    check_logps,
    check_loss,
    no_errors,
)

pytestmark = pytest.mark.medium  # compiles and emulates kernels

OBJECTIVES = {
    "clip": Objective(clip_high=0.28),
    "cispo, softcap": Objective(surrogate="cispo", logit_softcap=3.0),
    "sapo": Objective(surrogate="sapo"),
    "gmpo": SEQUENCE_LEVEL["gmpo"],
    "vespo": SEQUENCE_LEVEL["vespo rollout"],
    "gspo": SEQUENCE_LEVEL["gspo weighted"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_logits(name):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(V=130, objective=OBJECTIVES[name], entropy_bonus=0.3, temperatures=some_temperatures(4, 3))


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_gpus_and_dtypes(dtype, target):
    with no_errors(target=target, schedules=IN_TWO_ORDERS):
        check_loss(V=1000, dtype=dtype, temperatures=some_temperatures(4, 3))


def test_gradients_in_place_in_every_order():
    with no_errors(schedules=IN_EVERY_ORDER):
        check_loss(T=5, V=600, inplace=True, temperatures=0.4 + some_temperatures(4, 5))


@pytest.mark.parametrize("name", ["clip", "gspo"])
def test_a_bfloat16_head(name):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_loss(V=4099, objective=OBJECTIVES[name], has_bias=True, temperatures=some_temperatures(4, 3))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_log_probs_entropies_and_log_sum_exps(softcap):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_logps(V=4099, dtype=torch.float32, softcap=softcap, temperature=some_temperatures(3, 3))
        check_linear_logps(V=1000, return_lse=softcap is None, temperature=some_temperatures(3, 3))


@pytest.mark.parametrize("bonus", [0.0, 0.2])
def test_a_head_that_keeps_exponentials(bonus, monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")
    with no_errors(schedules=IN_TWO_ORDERS) as report:
        check_linear_loss(V=4099, T=2, entropy_bonus=bonus, temperatures=some_temperatures(4, 2))
        temperature = 0.6 + torch.arange(3) / 3
        rows.assert_rows_match(4 * rows.normal(3, 9000), with_entropies=bonus > 0, temperature=temperature)
    assert report.launches["log_grads_kernel" if bonus else "exponential_grads_kernel"] > 0


def test_a_head_that_is_sharded():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with no_errors(schedules=IN_TWO_ORDERS) as report:
            options = {"entropy_bonus": 0.2, "temperatures": some_temperatures(4, 3)}
            check_linear_loss(V=1000, vocab_group=dist.group.WORLD, **options)
    finally:
        dist.destroy_process_group()
    assert report.launches["combine_shards_kernel"] > 0
