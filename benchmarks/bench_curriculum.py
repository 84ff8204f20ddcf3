"""The curriculum: pass rates of 256 questions updated, and 256 questions drawn, out of 10 thousand to 100 million."""

import numpy
import pytest
import torch

from benchmarks.contenders import OURS
from benchmarks.floors import device_copy
from benchmarks.machine import Pairs, whole
from expo_kernels import CurriculumTable

QUESTIONS = tuple(10**power for power in range(4, 9))
DRAWN = 256
MULTINOMIAL_LIMIT = 2**24  # categories that torch.multinomial takes
NUMPY_LIMIT = 10**7  # beyond, numpy's draw takes minutes


@pytest.fixture(scope="module")
def tables(machine):
    """The table of one number of questions at a time; the first half of its questions is all but never drawn."""
    held: dict[int, CurriculumTable] = {}

    def of(num_questions: int) -> CurriculumTable:
        if num_questions not in held:
            held.clear()
            table = CurriculumTable(num_questions, std=0.05, device=machine.device)
            rates = torch.full((num_questions,), 0.5, device=machine.device)
            rates[: num_questions // 2] = 0.0
            table.load_state_dict({**table.state_dict(), "pass_rates": rates})
            held[num_questions] = table
        return held[num_questions]

    return of


def multinomial(table: CurriculumTable):
    weights = table.weights
    return lambda: weights.multinomial(DRAWN)


def numpy_choice(table: CurriculumTable):
    weights = table.weights.double().cpu().numpy()
    generator, probabilities = numpy.random.default_rng(0), weights / weights.sum()
    return lambda: torch.from_numpy(generator.choice(len(weights), DRAWN, replace=False, p=probabilities))


DRAWS = {
    OURS: (lambda table: lambda: table.sample(DRAWN), max(QUESTIONS)),
    "torch.multinomial": (multinomial, MULTINOMIAL_LIMIT),
    "numpy Generator.choice": (numpy_choice, NUMPY_LIMIT),
}


def sizes(is_tiny: bool) -> tuple[int, ...]:
    return QUESTIONS[:1] if is_tiny else QUESTIONS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("num_questions", sizes(metafunc.config.getoption("--tiny")))


@pytest.mark.parametrize("name", DRAWS)
def test_draw(num_questions, name, machine, table, tables, rounds):
    prepare, limit = DRAWS[name]
    named = {"case": "draw", "questions": num_questions, "contender": name}
    if num_questions > limit:
        table.append({**named, "note": f"takes at most {limit:,} questions"})
        pytest.skip(f"{name} takes at most {limit:,} questions")
    draw = prepare(tables(num_questions))
    drawn = draw()
    assert len(drawn.unique()) == DRAWN
    assert int(drawn.min()) >= num_questions // 2, "a question of weight e^-50 was drawn"
    assert int(drawn.max()) < num_questions
    pairs = Pairs(machine, device_copy(tables(num_questions).pass_rates))
    table.append({**named, **rounds(pairs, whole(pairs, draw))})


def test_update(num_questions, machine, table, tables, rounds):
    ours = tables(num_questions)
    ids = torch.randperm(num_questions // 2, device=machine.device)[:DRAWN] + num_questions // 2
    rates = torch.full((DRAWN,), 0.5, device=machine.device)  # which leaves them as they are
    before = ours.visits[ids].clone()
    ours.update(ids, rates)
    assert torch.equal(ours.visits[ids], before + 1)
    pairs = Pairs(machine, device_copy(ours.pass_rates))
    measured = rounds(pairs, whole(pairs, lambda: ours.update(ids, rates)))
    table.append({"case": "update", "questions": num_questions, "contender": OURS, **measured})
