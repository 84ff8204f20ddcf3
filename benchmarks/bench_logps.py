"""Log-probs of given tokens without gradients, alone and with entropies: what old and reference log-probs cost."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.contenders import OURS, contender, logps_and_entropies
from benchmarks.floors import one_product
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.machine import Pairs, whole
from benchmarks.truth import LOGPS_BOUND, largest_error, truth_of
from expo_kernels import linear_token_logps

WITH_LOGPS = [OURS, "eager log_softmax", "eager logsumexp", "Liger fused linear", "TRL chunked", "Apple CCE"]
WITH_ENTROPIES = [OURS, "eager log_softmax", "TRL chunked"]


@pytest.fixture(scope="module")
def checked(machine, side_case):
    inputs = make_inputs(side_case, machine.device)
    return inputs, truth_of(inputs)


def logps_of(name: str, inputs: Inputs) -> torch.Tensor:
    """Log-probs [B, T] without gradients; ours by the function made for it."""
    with torch.no_grad():
        if name == OURS:
            return linear_token_logps(inputs.hidden, inputs.weight, inputs.ids, mask=inputs.mask)
        return contender(name).logps(inputs)


def row(name: str, what: str, run: Callable[[], Any], errors: dict[str, float], inputs: Inputs, rounds, machine):
    """One row: `run` timed beside the product that makes the logits."""
    assert max(errors.values()) <= LOGPS_BOUND[inputs.case.dtype]
    pairs = Pairs(machine, one_product(inputs))
    measured = rounds(pairs, whole(pairs, run))
    named = {"case": f"{inputs.case}, {what}", "settings": asdict(inputs.case), "contender": name}
    return {**named, **measured, "errors": errors}


@pytest.mark.parametrize("name", WITH_LOGPS)
def test_logps(name, machine, table, rounds, checked, contender_here):
    contender_here(name)
    inputs, truth = checked
    errors = {"logps": largest_error(logps_of(name, inputs), truth.logps, inputs.mask)}
    table.append(row(name, "log-probs", lambda: logps_of(name, inputs), errors, inputs, rounds, machine))


@pytest.mark.parametrize("name", WITH_ENTROPIES)
def test_logps_and_entropies(name, machine, table, rounds, checked, contender_here):
    contender_here(name)
    inputs, truth = checked
    logps, entropies = logps_and_entropies(name, inputs)
    errors = {
        "logps": largest_error(logps, truth.logps, inputs.mask),
        "entropies": largest_error(entropies, truth.entropies, inputs.mask),
    }

    def run() -> object:
        return logps_and_entropies(name, inputs)

    table.append(row(name, "log-probs and entropies", run, errors, inputs, rounds, machine))
