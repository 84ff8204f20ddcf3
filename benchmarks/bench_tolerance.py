"""The loss with a gradient tolerance, on samples of a language model: time, errors, their bound, and columns kept."""

import pytest

from benchmarks.bench_loss import EAGER, LIGER
from benchmarks.contenders import OURS, TOLERANCES, TOLERANT, contender, our_linear_loss
from benchmarks.floors import three_products
from benchmarks.inputs import make_inputs
from benchmarks.measured_loss import measure_losses
from benchmarks.sampled_inputs import MODEL
from benchmarks.shapes import TINY, Case, dtype_for, smollm2

TEMPERATURES = (0.6, 0.8, 1.0)
NUM_TOKENS = 1024
GROWTH = (256, 512, 2048)


def cases_of(device: str, *, tiny: bool) -> list[tuple[Case, list[str]]]:
    """Every case with its contenders."""
    tolerant, dtype = [TOLERANT[tolerance].name for tolerance in TOLERANCES], dtype_for(device)
    if tiny:
        return [(Case(TINY, dtype, temperature=0.6), [OURS, *tolerant])]
    shape = smollm2(NUM_TOKENS)
    cases = [(Case(shape, dtype, temperature=t), [OURS, *tolerant, EAGER, LIGER]) for t in TEMPERATURES]
    cases[0][1].append("TRL chunked")
    cases.append((Case(shape, dtype, temperature=0.6, frozen_head=True), [OURS, tolerant[0]]))
    cases.append((Case(shape, "bfloat16", temperature=0.6), [OURS, tolerant[0], LIGER]))
    cases += [(Case(smollm2(number), dtype, temperature=0.8), [OURS, tolerant[0]]) for number in GROWTH]
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = cases_of(metafunc.config.getoption("--device"), tiny=metafunc.config.getoption("--tiny"))
    metafunc.parametrize(("case", "names"), cases, ids=[str(case) for case, _ in cases])


def test_tolerance(case, names, machine, table, rounds, obstacle_of):
    if case.shape != TINY and not MODEL.is_dir():
        pytest.skip("needs the model that `make smollm2` writes")
    inputs = make_inputs(case, machine.device)
    entries = [(str(case), contender(name), inputs) for name in names]
    measured = measure_losses(entries, machine, rounds, obstacle_of, three_products(inputs))
    tolerance_of = {candidate.name: tolerance for tolerance, candidate in TOLERANT.items()}
    for row in measured.rows:
        if row["contender"] in tolerance_of and "ms" in row:
            metrics = our_linear_loss(inputs, gradient_tolerance=tolerance_of[row["contender"]]).metrics
            row |= {name: float(metrics[name]) for name in ("gradient_error_bound", "kept_columns")}
    table += measured.rows
    assert not measured.failures
