"""The policy loss with its gradients: time forward, backward and both, extra peak memory, and error against float64."""

import pytest
import torch

from benchmarks.contenders import CONTENDERS, OURS, Contender, contender
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.measured_loss import loss_row
from benchmarks.shapes import Case, dtype_for, shapes_for, side_shape
from benchmarks.truth import truth_of

SIDES = ({"active_share": 0.5}, {"active_share": 0.25}, {"frozen_head": True}, {"ratio": "sequence"})
SIDE_CONTENDERS = (OURS, "eager log_softmax", "Liger fused linear")


def rows_of(device: str, *, tiny: bool) -> list[tuple[Case, Contender]]:
    """Every row of the table: all contenders at one shape, most at every shape, few on what is varied there."""
    dtype, one_shape = dtype_for(device), side_shape(device, tiny=tiny)
    plain = [
        (Case(shape, dtype), found)
        for shape in shapes_for(device, tiny=tiny)
        for found in CONTENDERS
        if found.is_everywhere or shape == one_shape
    ]
    beside = [Case(one_shape, dtype, **side) for side in SIDES]
    return plain + [(case, contender(name)) for case in beside for name in SIDE_CONTENDERS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = rows_of(metafunc.config.getoption("--device"), tiny=metafunc.config.getoption("--tiny"))
    metafunc.parametrize(("case", "found"), found, ids=[f"{case}, {found.name}" for case, found in found])


@pytest.fixture(scope="module")
def inputs_of(machine):
    """The inputs of a case and their truths; those of one case at a time are held."""
    held: dict = {}

    def of(case: Case) -> tuple[Inputs, dict]:
        if case not in held:
            held.clear()
            held[case] = (make_inputs(case, machine.device), {})
        return held[case]

    return of


def test_loss(case, found, machine, table, rounds, inputs_of):
    obstacle = found.obstacle(machine.device)
    if obstacle is not None:
        table.append({"case": str(case), "contender": found.name, "note": obstacle})
        pytest.skip(f"{found.name}: {obstacle}")
    inputs, truths = inputs_of(case)
    if found.loss_of not in truths:
        truths[found.loss_of] = truth_of(inputs, found.loss_of)
    try:
        table.append({"case": str(case), **loss_row(found, inputs, truths[found.loss_of], machine, rounds)})
    except torch.OutOfMemoryError:
        inputs.clear()
        torch.cuda.empty_cache()
        table.append({"case": str(case), "contender": found.name, "note": f"out of memory on {case}"})
        pytest.skip(f"{found.name}: out of memory")
