"""Time and memory by the size of a chunk of logits, `logits_budget_mb`."""

from benchmarks.contenders import CHUNKED, OURS, contender
from benchmarks.floors import three_products
from benchmarks.inputs import make_inputs
from benchmarks.measured_loss import measure_losses

NAMES = (OURS, *(found.name for found in CHUNKED), "eager log_softmax")


def test_chunks(machine, table, rounds, obstacle_of, side_case):
    inputs = make_inputs(side_case, machine.device)
    entries = [(str(side_case), contender(name), inputs) for name in NAMES]
    measured = measure_losses(entries, machine, rounds, obstacle_of, three_products(inputs))
    table += measured.rows
    assert not measured.failures
