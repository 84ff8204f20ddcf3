"""The loss from logits, as PTX in several orders of warps and thread blocks, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels import Objective
from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, TOKEN_LEVEL
from tests.ptx.checks import IN_EVERY_ORDER, IN_TWO_ORDERS, check_loss, check_packed_loss, no_errors

pytestmark = pytest.mark.medium  # compiles and emulates kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = TOKEN_LEVEL | SEQUENCE_LEVEL


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(objective=OBJECTIVES[name])


@pytest.mark.parametrize(
    "name", ["default", "softcap", "sapo", "gspo weighted", "gradient per token", "gmpo", "vespo rollout"]
)
def test_entropy_bonus_and_advantages_per_token(name):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(V=130, objective=OBJECTIVES[name], advantages="token", entropy_bonus=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [17, 128, 1000, 4099, 8192, 33_000])
def test_any_vocabulary_and_dtype(V, dtype):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(T=2 if V > 1000 else 3, V=V, dtype=dtype, advantages="sequence")


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_gpus(dtype, target):
    with no_errors(target=target, schedules=IN_TWO_ORDERS):
        check_loss(V=1000, dtype=dtype, objective=TOKEN_LEVEL["dual clip"], entropy_bonus=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [17, 1003, 4112])
def test_rows_that_are_not_aligned(V, dtype):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(T=2, V=V, dtype=dtype, aligned=False)


@pytest.mark.parametrize("advantages", ["rewards", "sequence", "token"])
@pytest.mark.parametrize(
    ("V", "dtype"), [(17, torch.float32), (4112, torch.float32), (4112, torch.bfloat16), (9000, torch.float16)], ids=str
)
def test_gradients_in_place_of_the_logits(V, dtype, advantages):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(T=2, V=V, dtype=dtype, advantages=advantages, inplace=True)


def test_gradients_in_place_of_a_sequence_level_objective():
    with no_errors(schedules=IN_TWO_ORDERS):
        check_loss(V=1000, objective=SEQUENCE_LEVEL["gspo weighted"], inplace=True)


@pytest.mark.parametrize("objective", [Objective(), SEQUENCE_LEVEL["gspo"]], ids=["token", "sequence"])
def test_packed_sequences(objective):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_packed_loss(objective=objective)


@pytest.mark.parametrize("name", ["default", "gspo", "gmpo"])
def test_many_rows_per_program_in_every_order(name):
    with no_errors(schedules=IN_EVERY_ORDER):
        check_loss(T=13, V=600, objective=OBJECTIVES[name])


def test_one_row_per_program():
    with no_errors(schedules=IN_EVERY_ORDER):
        check_loss(T=1, V=128)
