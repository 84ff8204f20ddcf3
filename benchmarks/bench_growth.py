"""How time and memory of the loss grow with the number of tokens and with the vocabulary, all else equal."""

from dataclasses import asdict

import pytest

from benchmarks.contenders import OURS, contender
from benchmarks.floors import three_products
from benchmarks.inputs import make_inputs
from benchmarks.machine import Pairs, forward_and_backward
from benchmarks.peak import extra_peak_mib
from benchmarks.shapes import Case, Shape, dtype_for
from benchmarks.truth import checked_errors, truth_of

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
    case = Case(shape, dtype_for(machine.device.type))
    inputs = make_inputs(case, machine.device)
    errors = checked_errors(contender(name), inputs, truth_of(inputs))
    run = contender(name).prepare(inputs)
    pairs = Pairs(machine, three_products(inputs))
    measured = rounds(pairs, forward_and_backward(pairs, run, inputs))
    inputs.clear()
    on_gpu = machine.is_gpu
    peak = machine.extra_peak_mib(lambda: run().backward()) if on_gpu else extra_peak_mib(name, case)
    named = {"case": series, "settings": asdict(case), "contender": name}
    hidden_mib = inputs.hidden.numel() * inputs.hidden.element_size() / 2**20
    table.append({**named, **measured, "extra_peak_mib": peak, "grad_hidden_mib": hidden_mib, "errors": errors})
