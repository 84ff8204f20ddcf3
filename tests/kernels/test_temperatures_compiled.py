"""Temperatures per reply and per token under torch.compile, and in the checks of torch.library."""

import pytest
import torch
from torch.library import opcheck

from expo_kernels import linear_token_logps
from tests.kernels.test_compile import (
    OPS,
    _nothing_compiled_before,  # noqa: F401 - a fixture
    assert_same_bits,
    linear,
    loss_arguments,
    make_call,
    outcome,
    positions,
    with_both,
)

FEW_ROWS = 7 * 13 * 4 / 2**20


def of_replies(call):
    return call["advantages"].abs() + 0.5


def of_tokens(call):
    return call["old_logps"].abs() + 0.5


CALLS = {
    "loss, a number": lambda call: linear(call, temperature=0.7),
    "loss, per reply": lambda call: linear(call, temperature=of_replies(call)),
    "loss, per token": lambda call: linear(
        call, temperature=of_tokens(call), entropy_bonus=0.1, logits_budget_mb=FEW_ROWS
    ),
    "log-probs, per token": lambda call: with_both(
        linear_token_logps(
            call["hidden"], call["weight"], call["completion_ids"], mask=call["completion_mask"], return_lse=True,
            temperature=of_tokens(call),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_give_equal_bits_forward_and_backward(name):
    call, function = make_call(), CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(outcome(compiled, call), outcome(function, call))


@pytest.mark.parametrize("of", [of_replies, of_tokens])
def test_torch_library_finds_nothing_wrong(of):
    call = make_call()
    arguments = loss_arguments(call)
    tensors = [*arguments[6][:-1], of(call)]
    assert set(opcheck(OPS.policy_loss, (*arguments[:6], tensors, *arguments[7:])).values()) == {"SUCCESS"}
    arguments = *(call["logits"], None, None, *positions(call), None, of(call)), *(1.0, None, None)
    settings = True, True, None, 0.0, True
    assert set(opcheck(OPS.token_logps, (*arguments, *settings)).values()) == {"SUCCESS"}


def test_values_are_checked_when_the_compiled_graph_runs():
    def function(call):
        return linear(call, temperature=call["temperature"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    call = make_call() | {"temperature": torch.ones(4)}
    compiled(call)
    with pytest.raises(ValueError, match=r"temperature ranges over \[0, 1\]; expected finite numbers > 0"):
        compiled(call | {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])})
