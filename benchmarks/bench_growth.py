"""How time and memory of the loss grow with the number of tokens and with the vocabulary, all else equal."""

import pytest

from benchmarks.contenders import OURS, contender
from benchmarks.inputs import make_inputs
from benchmarks.measured_loss import loss_row
from benchmarks.shapes import Case, Shape, dtype_for
from benchmarks.truth import truth_of

# (tokens, vocabulary) of the point that both series share, hidden size, and the factors of each series
MIDDLE = {"cpu": ((1024, 16_384), 128), "cuda": ((8192, 65_536), 2048)}
FACTORS = (0.5, 1, 2, 4)
NAMES = (OURS, "eager log_softmax")


def shape(num_tokens: int, hidden_size: int, vocab_size: int) -> Shape:
    return Shape(f"N = {num_tokens:,}, V = {vocab_size:,}", 8, num_tokens // 8, hidden_size, vocab_size)


def points(device: str, *, tiny: bool) -> list[tuple[str, Shape]]:
    """Series and shape of every point."""
    (tokens, vocab), hidden = ((64, 512), 16) if tiny else MIDDLE[device]
    along_n = [("N", shape(int(factor * tokens), hidden, vocab)) for factor in FACTORS]
    return along_n + [("V", shape(tokens, hidden, int(factor * vocab))) for factor in FACTORS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = points(metafunc.config.getoption("--device"), tiny=metafunc.config.getoption("--tiny"))
    found = [(series, shape, name) for series, shape in found for name in NAMES]
    labels = [f"{series}: {shape.name}, {name}" for series, shape, name in found]
    metafunc.parametrize(("series", "shape", "name"), found, ids=labels)


def test_growth(series, shape, name, machine, table, rounds):
    inputs = make_inputs(Case(shape, dtype_for(machine.device.type)), machine.device)
    table.append({"case": series, **loss_row(contender(name), inputs, truth_of(inputs), machine, rounds)})
