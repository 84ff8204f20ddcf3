"""The curriculum: update of 256 pass rates and draw of 256 questions, out of 10 thousand to 100 million questions.

A draw is timed from pass rates to question ids. The peers compute all weights from the pass rates in every draw; ours
stores log-weights, which its update, timed separately, keeps in step with the pass rates.
"""

from collections.abc import Callable

import numpy
import pytest
import torch

from benchmarks.contenders import OURS
from benchmarks.floors import device_copy
from benchmarks.machine import RoundRobin, whole
from expo_kernels import CurriculumTable

QUESTIONS = tuple(10**power for power in range(4, 9))
DRAWN, STD = 256, 0.05
Draw = Callable[[], torch.Tensor]


def make_table(num_questions: int, device: torch.device) -> CurriculumTable:
    """A table whose first half of the questions has negligible weight."""
    table = CurriculumTable(num_questions, std=STD, device=device)
    rates = torch.full((num_questions,), 0.5, device=device)
    rates[: num_questions // 2] = 0.0
    table.load_state_dict({**table.state_dict(), "pass_rates": rates})
    return table


def ours(table: CurriculumTable) -> Draw:
    return lambda: table.sample(DRAWN)


def multinomial(table: CurriculumTable) -> Draw:
    rates = table.pass_rates

    def draw() -> torch.Tensor:
        weights = (rates - table.mean).square_().mul_(-0.5 / STD**2).exp_()
        return weights.multinomial(DRAWN)

    return draw


def numpy_choice(table: CurriculumTable) -> Draw:
    # a copy of the pass rates in NumPy's memory and dtype, outside the timed draw
    rates, generator = table.pass_rates.double().cpu().numpy(), numpy.random.default_rng(0)

    def draw() -> torch.Tensor:
        weights = numpy.exp(-0.5 / STD**2 * (rates - table.mean) ** 2)
        weights /= weights.sum()
        return torch.from_numpy(generator.choice(len(weights), DRAWN, replace=False, p=weights))

    return draw


# by contender: how it draws, its largest number of questions, and the reason for that limit
DRAWS: dict[str, tuple[Callable[[CurriculumTable], Draw], int, str]] = {
    OURS: (ours, max(QUESTIONS), ""),
    "torch.multinomial": (multinomial, 2**24, "takes at most 16,777,216 questions"),
    "numpy Generator.choice": (numpy_choice, 10**7, "skipped beyond 10,000,000 questions, where a draw takes seconds"),
}


def sizes(is_tiny: bool) -> tuple[int, ...]:
    return QUESTIONS[:1] if is_tiny else QUESTIONS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("num_questions", sizes(metafunc.config.getoption("--tiny")))


def checked(draw: Draw, num_questions: int) -> Draw:
    drawn = draw()
    assert len(drawn.unique()) == DRAWN
    assert int(drawn.min()) >= num_questions // 2, "a question of weight e^-50 was drawn"
    assert int(drawn.max()) < num_questions
    return draw


def test_draw(num_questions, machine, table, rounds):
    curriculum, draws = make_table(num_questions, machine.device), {}
    for name, (prepare, most, why) in DRAWS.items():
        if num_questions > most:
            table.append({"case": "draw", "questions": num_questions, "contender": name, "note": why})
        else:
            draws[name] = checked(prepare(curriculum), num_questions)
    runs = {name: whole(machine, draw) for name, draw in draws.items()}
    for name, times in rounds(RoundRobin(machine, runs, device_copy(curriculum.pass_rates))).items():
        table.append({"case": "draw", "questions": num_questions, "contender": name, **times})


def test_update(num_questions, machine, table, rounds):
    curriculum = make_table(num_questions, machine.device)
    ids = torch.randperm(num_questions // 2, device=machine.device)[:DRAWN] + num_questions // 2
    rates = torch.full(
        (DRAWN,), 0.5, device=machine.device
    )  # equal to the current values, so the table does not change
    before = curriculum.visits[ids].clone()
    curriculum.update(ids, rates)
    assert torch.equal(curriculum.visits[ids], before + 1)
    runs = {OURS: whole(machine, lambda: curriculum.update(ids, rates))}
    times = rounds(RoundRobin(machine, runs, device_copy(curriculum.pass_rates)))[OURS]
    table.append({"case": "update", "questions": num_questions, "contender": OURS, **times})
