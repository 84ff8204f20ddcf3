"""How time and memory of the loss grow with the number of tokens and with the vocabulary.

All points of a series run in every round, so that each round gives its own slope.
"""

import pytest

from benchmarks.contenders import OURS, contender
from benchmarks.inputs import make_inputs
from benchmarks.measured_loss import measure_losses
from benchmarks.shapes import Case, Shape, dtype_for

# (tokens, vocabulary) that stay constant in the other series, hidden size; the fixed cost of a call, about 10 ms on a
# CPU, should be small compared to the smallest point
MIDDLE = {"cpu": ((1024, 16_384), 128), "cuda": ((8192, 65_536), 2048)}
AROUND = (0.5, 1, 2, 4)
FACTORS = {"cpu": {"N": (2, 4, 8, 16), "V": AROUND}, "cuda": {"N": AROUND, "V": AROUND}}
NAMES = (OURS, "eager log_softmax")


def shape(num_tokens: int, hidden_size: int, vocab_size: int) -> Shape:
    return Shape(f"N = {num_tokens:,}, V = {vocab_size:,}", 8, num_tokens // 8, hidden_size, vocab_size)


def points(device: str, series: str, *, tiny: bool) -> list[Shape]:
    """The shapes of one series."""
    (tokens, vocab), hidden = ((64, 512), 16) if tiny else MIDDLE[device]
    if series == "N":
        return [shape(int(factor * tokens), hidden, vocab) for factor in FACTORS[device]["N"]]
    return [shape(tokens, hidden, int(factor * vocab)) for factor in FACTORS[device]["V"]]


@pytest.mark.parametrize("series", ["N", "V"])
def test_growth(series, machine, table, rounds, obstacle_of, is_tiny):
    kind = machine.device.type
    inputs_of_points = [
        make_inputs(Case(s, dtype_for(kind)), machine.device) for s in points(kind, series, tiny=is_tiny)
    ]
    entries = [(series, contender(name), inputs) for inputs in inputs_of_points for name in NAMES]
    measured = measure_losses(entries, machine, rounds, obstacle_of)
    table += measured.rows
    assert not measured.failures
