"""The policy loss with its gradients: forward and backward time, extra peak memory, and errors against float64."""

import pytest

from benchmarks.contenders import CONTENDERS, OURS, contender
from benchmarks.floors import three_products
from benchmarks.inputs import make_inputs
from benchmarks.measured_loss import measure_losses
from benchmarks.shapes import WIDE, Case, dtype_for, shapes_for, side_shape

EAGER, LIGER, TRL = "eager log_softmax", "Liger fused linear", "TRL chunked"
SIDES = ({"active_share": 0.5}, {"active_share": 0.25}, {"frozen_head": True}, {"ratio": "sequence"})


def cases_of(device: str, *, tiny: bool) -> list[tuple[Case, list[str]]]:
    """Every case with its contenders: all at one shape, most at every shape, three in its variations."""
    dtype, one_shape = dtype_for(device), side_shape(device, tiny=tiny)
    cases = []
    for shape in shapes_for(device, tiny=tiny):
        cases.append(
            (Case(shape, dtype), [c.name for c in CONTENDERS if c.is_at_every_shape(device) or shape == one_shape])
        )
    # TRL's head leaves masked tokens out on a GPU only
    names = [OURS, EAGER, LIGER, TRL] if device == "cuda" else [OURS, EAGER, LIGER]
    cases += [(Case(one_shape, dtype, **side), names) for side in SIDES]
    if device == "cpu":
        if not tiny:
            cases.append((Case(WIDE, dtype), [OURS, EAGER, LIGER]))
        # without Liger, which takes about ten times as long as eager PyTorch here: half a minute
        cases.append((Case(one_shape, "bfloat16"), [OURS, EAGER]))
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = cases_of(metafunc.config.getoption("--device"), tiny=metafunc.config.getoption("--tiny"))
    metafunc.parametrize(("case", "names"), cases, ids=[str(case) for case, _ in cases])


def test_loss(case, names, machine, table, rounds, obstacle_of):
    inputs = make_inputs(case, machine.device)
    entries = [(str(case), contender(name), inputs) for name in names]
    measured = measure_losses(entries, machine, rounds, obstacle_of, three_products(inputs))
    table += measured.rows
    assert not measured.failures
