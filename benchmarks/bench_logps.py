"""Log-probs of given tokens without gradients, with and without entropies, as for old and reference log-probs."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.contenders import OURS, contender, logps_and_entropies
from benchmarks.floors import one_product
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.machine import RoundRobin, whole
from benchmarks.truth import LOGPS_BOUND, Truth, largest_error, truth_of
from expo_kernels import linear_token_logps

WITH_LOGPS = [OURS, "eager log_softmax", "eager logsumexp", "Liger fused linear", "TRL chunked", "Apple CCE"]
WITH_ENTROPIES = [OURS, "eager log_softmax", "TRL chunked"]


def logps_of(name: str, inputs: Inputs) -> torch.Tensor:
    """Log-probs [B, T] without gradients; ours by `linear_token_logps`."""
    with torch.no_grad():
        if name == OURS:
            return linear_token_logps(inputs.hidden, inputs.weight, inputs.ids, mask=inputs.mask)
        return contender(name).logps(inputs)


def logps_errors(name: str, inputs: Inputs, truth: Truth) -> dict[str, float]:
    return {"logps": largest_error(logps_of(name, inputs), truth.logps, inputs.mask)}


def entropy_errors(name: str, inputs: Inputs, truth: Truth) -> dict[str, float]:
    logps, entropies = logps_and_entropies(name, inputs)
    return {
        "logps": largest_error(logps, truth.logps, inputs.mask),
        "entropies": largest_error(entropies, truth.entropies, inputs.mask),
    }


Errors = Callable[[str, Inputs, Truth], dict[str, float]]
KINDS: dict[str, tuple[list[str], Callable[[str, Inputs], Any], Errors]] = {
    "log-probs": (WITH_LOGPS, logps_of, logps_errors),
    "log-probs and entropies": (WITH_ENTROPIES, logps_and_entropies, entropy_errors),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logps(kind, machine, table, rounds, side_case, obstacle_of):
    names, compute, errors_of = KINDS[kind]
    names = [name for name in names if obstacle_of(name) is None]
    inputs = make_inputs(side_case, machine.device)
    truth = truth_of(inputs)
    errors = {name: errors_of(name, inputs, truth) for name in names}
    for name, of_contender in errors.items():
        assert max(of_contender.values()) <= LOGPS_BOUND[side_case.dtype], name

    def once(name: str) -> Callable[[], Any]:
        return lambda: compute(name, inputs)

    robin = RoundRobin(machine, {name: whole(machine, once(name)) for name in names}, one_product(inputs))
    described = {"case": f"{side_case}, {kind}", "settings": asdict(side_case)}
    for name, times in rounds(robin).items():
        table.append({**described, "contender": name, **times, "errors": errors[name]})
