"""One contender's loss on one case, measured: what a row of the tables of the loss holds."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.floors import three_products
from benchmarks.inputs import Inputs
from benchmarks.machine import Machine, Pairs, forward_and_backward
from benchmarks.peak import extra_peak_mib
from benchmarks.truth import Truth, checked_errors


def loss_row(
    found: Contender, inputs: Inputs, truth: Truth, machine: Machine, rounds: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Errors, rounds beside the floor, and memory.

    Raises: WrongResultError if the contender computes something else.
    """
    errors = checked_errors(found, inputs, truth)
    run = found.prepare(inputs)
    pairs = Pairs(machine, three_products(inputs))
    measured = rounds(pairs, forward_and_backward(pairs, run, inputs))
    inputs.clear()
    if machine.is_gpu:
        peak = machine.extra_peak_mib(lambda: run().backward())
    else:
        peak = extra_peak_mib(found.name, inputs.case)
    gradients = {name: _mib(tensor) for name, tensor in vars(inputs).items() if _is_learnt(tensor)}
    return {
        "settings": asdict(inputs.case),
        "contender": found.name,
        "computes": found.computes,
        **measured,
        "extra_peak_mib": peak,
        "gradients_mib": gradients,  # which every contender hands out
        "errors": errors,
    }


def _is_learnt(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _mib(tensor: Tensor) -> float:
    return tensor.numel() * tensor.element_size() / 2**20
