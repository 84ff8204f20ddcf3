"""Heads that keep bfloat16 exponentials of their logits, as PTX, against float64."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from tests.kernels.interpreter import check_exponentials as rows
from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, TOKEN_LEVEL
from tests.ptx.checks import IN_EVERY_ORDER, IN_TWO_ORDERS, check_linear_logps, check_linear_loss, no_errors

pytestmark = pytest.mark.medium  # compiles and emulates kernels

OBJECTIVES = TOKEN_LEVEL | SEQUENCE_LEVEL


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")


@pytest.mark.parametrize("name", ["rollout", "token", "softcap", "gspo weighted", "vespo"])
def test_losses(name):
    with no_errors(schedules=IN_TWO_ORDERS) as report:
        check_linear_loss(objective=OBJECTIVES[name], has_bias=True)
    assert report.launches["exponentials_kernel"] > 0
    assert report.launches["exponential_grads_kernel"] > 0


def test_exponentials_in_every_order():
    with no_errors(schedules=IN_EVERY_ORDER):
        check_linear_loss(V=9000, T=2, advantages="token")


@pytest.mark.parametrize("V", [4099, 8192])
def test_logs_for_an_entropy_bonus(V):
    with no_errors(schedules=IN_TWO_ORDERS) as report:
        check_linear_loss(V=V, T=2, entropy_bonus=0.2)
    assert report.launches["log_grads_kernel"] > 0


def test_log_probs_and_their_gradients():
    with no_errors(schedules=IN_TWO_ORDERS):
        check_linear_logps(V=4099)


@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize(("V", "offset"), [(17, 0.0), (9000, -1e4), (33_000, 1e4)])
def test_rows_of_given_logits(V, offset, with_entropies):
    with no_errors(schedules=IN_TWO_ORDERS):
        rows.assert_rows_match(4 * rows.normal(3, V) + offset, with_entropies=with_entropies, temperature=0.8)


def test_tiles_that_are_scaled_later():
    """The chosen column, the most probable other one, and both, in tiles that are scaled."""
    logits = rows.normal(3, 3 * rows.COLUMNS + 5)
    logits[:, 2 * rows.COLUMNS] = 80.0
    logits[1, 9] = 79.0
    logits[2, 9] = -math.inf
    with no_errors(schedules=IN_EVERY_ORDER):
        rows.assert_rows_match(logits, torch.tensor([3, 2 * rows.COLUMNS, 5]))
