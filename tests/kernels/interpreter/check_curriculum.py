"""The curriculum's kernels, run by Triton's interpreter, against the PyTorch path.

Run through `test_interpreter.py`.
"""

import pytest
import torch

from expo_kernels import CurriculumTable, _launch


def both(*, monkeypatch, steps, **settings):
    """A table updated by the kernels, and one updated by PyTorch."""
    tables = []
    for kernels in (True, False):
        monkeypatch.setattr(_launch._switch, "kernels_on_cpu", kernels)
        table = CurriculumTable(**settings)
        for ids, rates in steps:
            table.update(ids, rates)
        tables.append(table)
    monkeypatch.setattr(_launch._switch, "kernels_on_cpu", True)
    return tables


@pytest.mark.parametrize("estimate", ["ema", "counted"])
@pytest.mark.parametrize(("num_questions", "count"), [(1, 1), (5, 7), (3000, 2500)])
def test_updates_agree_with_pytorch(monkeypatch, num_questions, count, estimate):
    steps = [(torch.randint(0, num_questions, (count,)), torch.rand(count)) for _ in range(3)]
    settings = {"num_questions": num_questions, "std": 0.2, "momentum": 0.6, "estimate": estimate}
    kernels, plain = both(monkeypatch=monkeypatch, steps=steps, **settings)
    assert torch.equal(kernels.visits, plain.visits)
    assert torch.allclose(kernels.pass_rates, plain.pass_rates, rtol=2e-7)
    assert torch.allclose(kernels.weights, plain.weights, rtol=2e-6)


def test_repeated_ids_are_averaged_whatever_their_order():
    ids, rates = torch.tensor([3, 1, 3, 3, 0, 1]), torch.tensor([0.1, 0.2, 0.7, 0.4, 1.0, 0.9])
    made = []
    for order in (torch.arange(6), torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([2, 0, 5, 3, 4, 1])):
        table = CurriculumTable(4)
        table.update(ids[order], rates[order])
        made.append(table.pass_rates.clone())
        assert table.visits.tolist() == [1, 1, 0, 1]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert torch.allclose(made[0], torch.tensor([0.55, 0.505, 0.5, 0.49]))


def test_a_run_longer_than_a_block():
    count = 2 * _launch.curriculum_tile().block + 5
    table = CurriculumTable(3)
    table.update(torch.ones(count, dtype=torch.int64), torch.linspace(0, 1, count))
    assert table.visits.tolist() == [0, 1, 0]
    assert torch.allclose(table.pass_rates, torch.full((3,), 0.5))


def test_updating_nothing_changes_nothing():
    table = CurriculumTable(3)
    table.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert table.visits.tolist() == [0, 0, 0]


def test_equal_seeds_draw_equal_questions():
    table = CurriculumTable(300)
    first, again, other = (table.sample(50, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 50


def test_draws_follow_the_weights():
    # one race among 4,000 questions: those with the larger weight are drawn exp(1) times as often
    table = CurriculumTable(4000, std=0.35, momentum=0.0)
    heavy = torch.arange(0, 4000, 2)
    table.update(heavy, torch.full((2000,), 0.5))
    table.update(heavy + 1, torch.full((2000,), 0.5 + 0.35 * 2**0.5))
    drawn = table.sample(400, generator=torch.Generator().manual_seed(3))
    share = float((drawn % 2 == 0).double().mean())
    expected = 1 / (1 + torch.tensor(-1.0).exp().item())  # only a tenth is drawn, so that the shares hardly change
    assert abs(share - expected) < 0.06


def test_all_questions_can_be_drawn():
    assert sorted(CurriculumTable(2500).sample(2500).tolist()) == list(range(2500))
