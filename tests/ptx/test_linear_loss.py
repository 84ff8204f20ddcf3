"""The loss from hidden states in several chunks, and log-probs, as PTX, against float64.

Float32 and float16 heads have float32 gradients in place of the logits; bfloat16 heads have bfloat16 gradients in the
front of the float32 rows.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, TOKEN_LEVEL
from tests.ptx.checks import (
    IN_EVERY_ORDER,
    IN_TWO_ORDERS,
    check_linear_logps,
    check_linear_loss,
    check_logps,
    no_errors,
)

pytestmark = pytest.mark.medium  # compiles and emulates kernels

OBJECTIVES = TOKEN_LEVEL | SEQUENCE_LEVEL


@pytest.mark.parametrize("name", ["rollout", "token", "gspo weighted", "gmpo rollout", "vespo"])
def test_bfloat16_head(name):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_loss(objective=OBJECTIVES[name], has_bias=True)


@pytest.mark.parametrize("advantages", ["rewards", "sequence"])
@pytest.mark.parametrize("V", [4099, 8192, 33_000])
def test_bfloat16_gradients_in_the_front_of_float32_rows(V, advantages):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_loss(V=V, T=2, advantages=advantages)


def test_bfloat16_gradients_in_every_order():
    with no_errors(schedules=IN_EVERY_ORDER):
        check_linear_loss(V=8192, rows_per_chunk=6, objective=OBJECTIVES["softcap"], entropy_bonus=0.2)


@pytest.mark.parametrize("advantages", ["rewards", "sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_float32_gradients_in_place_of_the_logits(dtype, advantages):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_loss(V=4112, T=2, dtype=dtype, advantages=advantages)


def test_float32_gradients_of_a_small_bfloat16_head():
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_loss(V=17)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("V", "dtype"), [(17, torch.float32), (4099, torch.bfloat16), (8192, torch.float16)], ids=str)
def test_log_probs_and_entropies_with_their_gradients(V, dtype, softcap):
    with no_errors(schedules=IN_TWO_ORDERS):
        check_logps(V=V, dtype=dtype, softcap=softcap)


def test_log_probs_of_a_head_in_chunks():
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_logps(V=4099)
