import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from expo_kernels import CurriculumTable


def table_with(pass_rates, **settings):
    table = CurriculumTable(len(pass_rates), momentum=0.0, **settings)
    table.update(torch.arange(len(pass_rates)), torch.tensor(pass_rates))
    return table


def test_starts_uniform():
    table = CurriculumTable(10)
    assert table.pass_rates.eq(0.5).all()
    assert table.weights.eq(1).all()
    assert table.visits.eq(0).all()
    assert table.effective_sample_size.item() == pytest.approx(10)


def test_ema_and_weights_by_hand():
    table = CurriculumTable(4)
    table.update(torch.tensor([2, 0]), torch.tensor([1.0, 0.0]))
    # 0.9 * 0.5 + 0.1 * rate, twice for question 2
    assert table.pass_rates.tolist() == pytest.approx([0.45, 0.5, 0.55, 0.5], abs=1e-7)
    table.update(torch.tensor([2]), torch.tensor([1.0]))
    assert table.pass_rates[2].item() == pytest.approx(0.595, abs=1e-7)
    assert table.visits.tolist() == [1, 0, 2, 0]
    weights = np.exp(-((np.array([0.45, 0.5, 0.595, 0.5]) - 0.5) ** 2) / (2 * 0.35**2))
    assert table.weights.tolist() == pytest.approx(weights.tolist(), abs=1e-6)
    assert table.effective_sample_size.item() == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-5)


def test_a_counted_estimate_is_the_mean_of_the_visits_then_the_moving_average():
    table = CurriculumTable(3, momentum=0.75, initial_pass_rate=0.9, estimate="counted")
    rates = [0.25, 0.75, 0.5, 1.0]
    for count, rate in enumerate(rates, start=1):
        table.update(torch.tensor([1]), torch.tensor([rate]))
        assert table.pass_rates[1].item() == pytest.approx(np.mean(rates[:count]))
    table.update(torch.tensor([1]), torch.tensor([0.0]))
    assert table.pass_rates.tolist() == pytest.approx([0.9, 0.75 * np.mean(rates), 0.9])


@given(rates=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), momentum=st.floats(0, 0.95))
def test_a_counted_estimate_follows_its_rule_whatever_it_started_from(rates, momentum):
    starts = (0.0, 1.0)
    tables = [CurriculumTable(1, momentum=momentum, initial_pass_rate=s, estimate="counted") for s in starts]
    expected = 0.0
    for visit, rate in enumerate(rates):
        kept = min(momentum, visit / (visit + 1))
        expected = kept * expected + (1 - kept) * rate
        for table in tables:
            table.update(torch.tensor([0]), torch.tensor([rate]))
            assert table.pass_rates.item() == pytest.approx(expected, abs=1e-6)
            weight = np.exp(-((table.pass_rates.item() - 0.5) ** 2) / (2 * 0.35**2))
            assert table.weights.item() == pytest.approx(weight, abs=1e-6)


def test_pass_rates_0_and_1_have_weight_0_3604():
    assert table_with([0.0, 1.0, 0.5]).weights.tolist() == pytest.approx([0.36044778, 0.36044778, 1.0], abs=1e-6)


def test_repeated_ids_are_averaged_first_and_count_as_one_visit():
    table = CurriculumTable(3)
    table.update(torch.tensor([1, 1, 1]), torch.tensor([1.0, 0.0, 0.5]))
    assert table.pass_rates[1].item() == pytest.approx(0.5)
    assert table.visits.tolist() == [0, 1, 0]


@given(data=st.data())
def test_the_order_of_an_update_never_matters(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1, width=32)), min_size=1, max_size=20))
    states = []
    for order in (pairs, data.draw(st.permutations(pairs))):
        table = CurriculumTable(5)
        ids, rates = zip(*order, strict=True)
        table.update(torch.tensor(ids), torch.tensor(rates))
        states.append(table)
    assert torch.equal(states[0].pass_rates, states[1].pass_rates)
    assert torch.equal(states[0].weights, states[1].weights)
    assert torch.equal(states[0].visits, states[1].visits)


def test_an_update_leaves_all_others_alone():
    table = table_with([0.1, 0.2, 0.3, 0.4])
    before = table.pass_rates.clone(), table.weights.clone()
    table.update(torch.tensor([2]), torch.tensor([0.9]))
    others = torch.tensor([0, 1, 3])
    assert torch.equal(table.pass_rates[others], before[0][others])
    assert torch.equal(table.weights[others], before[1][others])


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_agree_with_the_weights(replacement):
    table = table_with([0.0, 0.1, 0.3, 0.5, 0.7, 0.95], std=0.2)
    generator = torch.Generator().manual_seed(1)
    if replacement:
        ids = table.sample(200_000, generator=generator, replacement=True)
    else:
        # the first draw has Pr proportional to w; one large table stands for many small ones
        many = CurriculumTable(6 * 500, momentum=0.0, std=0.2)
        many.update(torch.arange(6 * 500), table.pass_rates.repeat(500))
        ids = torch.cat([many.sample(1, generator=generator) for _ in range(20_000)]) % 6
    counts = torch.bincount(ids, minlength=6).numpy()
    expected = (table.weights.double() / table.weights.double().sum()).numpy() * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_inclusion_without_replacement_agrees_with_the_exact_probabilities():
    weights = table_with([0.5, 0.3, 0.8], std=0.2)
    w = weights.weights.double()
    w = w / w.sum()
    # drawing 2 of 3: Pr that i is left out is the sum over both orders of the other two
    left_out = [
        sum(w[a] * w[b] / (1 - w[a]) for a in range(3) for b in range(3) if a != b and i not in (a, b)).item()
        for i in range(3)
    ]
    generator = torch.Generator().manual_seed(2)
    counts = np.zeros(3)
    for _ in range(20_000):
        counts[3 - int(weights.sample(2, generator=generator).sum())] += 1
    assert stats.chisquare(counts, np.array(left_out) * 20_000).pvalue > 1e-3


def test_ids_are_in_the_order_of_the_draws():
    table = table_with([0.5, 0.3, 0.8], std=0.2)
    w = table.weights.double() / table.weights.double().sum()
    pairs = list(itertools.permutations(range(3), 2))
    expected = np.array([float(w[a] * w[b] / (1 - w[a])) for a, b in pairs])
    generator = torch.Generator().manual_seed(3)
    counts = dict.fromkeys(pairs, 0)
    for _ in range(20_000):
        counts[tuple(table.sample(3, generator=generator)[:2].tolist())] += 1
    assert stats.chisquare(list(counts.values()), 20_000 * expected).pvalue > 1e-3


def test_a_longer_draw_begins_with_the_shorter_one():
    table = table_with(torch.rand(1000).tolist())
    draws = [table.sample(k, generator=torch.Generator().manual_seed(4)) for k in (10, 400)]
    assert torch.equal(draws[0], draws[1][:10])


def test_without_replacement_no_question_comes_twice():
    assert table_with([0.0, 0.5, 1.0], std=0.01).sample(3).sort().values.tolist() == [0, 1, 2]
    assert CurriculumTable(1000).sample(900).unique().numel() == 900


def test_a_window_too_narrow_for_float_weights_still_draws_nearest_first():
    table = table_with([0.9, 0.6, 0.51, 0.0], std=1e-6)
    assert table.weights.eq(0).all()
    for _ in range(20):
        assert table.sample(3).tolist() == [2, 1, 0]
        assert table.sample(5, replacement=True).eq(2).all()


def test_a_generator_repeats_the_draw():
    table = CurriculumTable(100)
    for replacement in (False, True):
        draws = [
            table.sample(10, generator=torch.Generator().manual_seed(s), replacement=replacement) for s in (5, 5, 6)
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_a_loaded_state_is_exact():
    table = CurriculumTable(50, std=0.2)
    table.update(torch.randint(0, 50, (30,)), torch.rand(30))
    state = table.state_dict()
    other = CurriculumTable(50, std=0.2)
    other.load_state_dict(state)
    assert torch.equal(other.pass_rates, table.pass_rates)
    assert torch.equal(other.visits, table.visits)
    assert torch.equal(other.weights, table.weights)
    # the state is a copy: later updates do not change it
    saved = state["pass_rates"].clone()
    table.update(torch.arange(50), torch.ones(50))
    assert torch.equal(state["pass_rates"], saved)


def test_a_counted_state_is_loaded_and_a_state_without_estimate_is_ema():
    table, other = (CurriculumTable(2, estimate="counted") for _ in range(2))
    table.update(torch.tensor([1]), torch.tensor([1.0]))
    other.load_state_dict(table.state_dict())
    for each in (table, other):
        each.update(torch.tensor([1]), torch.tensor([0.0]))
        assert each.pass_rates.tolist() == [0.5, 0.5]
    older = CurriculumTable(2).state_dict()
    del older["estimate"]
    CurriculumTable(2).load_state_dict(older)
    with pytest.raises(ValueError, match="state has estimate=ema, but this table counted"):
        table.load_state_dict(older)


def test_a_posterior_draw_follows_the_beta_distribution_of_the_counted_replies():
    table = CurriculumTable(3, std=0.2, estimate="posterior", group_size=4)
    for _ in range(2):
        table.update(torch.tensor([0, 1]), torch.tensor([0.25, 1.0]))
    assert table.pass_rates.tolist() == [0.25, 1.0, 0.5]  # as with "counted"
    beta = [torch.distributions.Beta(*map(torch.tensor, counts)) for counts in ((3.0, 7.0), (9.0, 1.0), (1.0, 1.0))]
    weights = [torch.exp(-((each.sample((200_000,)) - 0.5) ** 2) / (2 * 0.2**2)) for each in beta]
    shares = torch.stack([each / sum(weights) for each in weights]).mean(1)
    generator = torch.Generator().manual_seed(0)
    for replacement in (False, True):
        drawn = [table.sample(1, generator=generator, replacement=replacement).item() for _ in range(4000)]
        counts = torch.bincount(torch.tensor(drawn), minlength=3)
        assert (counts / 4000 - shares).abs().max() < 0.03


def test_a_posterior_table_is_saved_loaded_and_drawn_again():
    table, other = (CurriculumTable(50, estimate="posterior", group_size=8) for _ in range(2))
    table.update(torch.arange(20), torch.linspace(0, 1, 20))
    other.load_state_dict(table.state_dict())
    first, second = (each.sample(50, generator=torch.Generator().manual_seed(3)) for each in (table, other))
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(50))
    with pytest.raises(ValueError, match="group_size is 0"):
        CurriculumTable(5, estimate="posterior", group_size=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"std": 0.1}, "state has std=0.1"),
        ({"num_questions": 6}, "state has num_questions=6"),
        ({"pass_rates": torch.zeros(4)}, r"state\['pass_rates'\] has shape \[4\]"),
        ({"pass_rates": torch.full((5,), 2.0)}, "ranges over"),
        ({"extra": 1}, "state holds"),
    ],
)
def test_a_foreign_state_is_refused(change, named):
    table = CurriculumTable(5)
    with pytest.raises(ValueError, match=named):
        table.load_state_dict(table.state_dict() | change)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_questions": 0}, "num_questions is 0"),
        ({"mean": 1.5}, "mean is 1.5"),
        ({"std": 0.0}, "std is 0.0"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"initial_pass_rate": -0.1}, "initial_pass_rate is -0.1"),
        ({"estimate": "mean"}, "estimate is 'mean'; expected one of 'ema', 'counted', 'posterior'"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        CurriculumTable(**({"num_questions": 5} | settings))


@pytest.mark.parametrize(
    ("ids", "rates", "named"),
    [
        ([5], [0.5], "question_ids holds 5"),
        ([-1], [0.5], "question_ids holds -1"),
        ([0], [1.5], "pass_rates ranges over"),
        ([0], [float("nan")], "pass_rates holds 1 non-finite"),
        ([0, 1], [0.5], "pass_rates has shape"),
    ],
)
def test_a_bad_update_is_refused_and_changes_nothing(ids, rates, named):
    table = CurriculumTable(5)
    with pytest.raises(ValueError, match=named):
        table.update(torch.tensor(ids), torch.tensor(rates))
    assert table.visits.eq(0).all()


def test_a_draw_too_large_is_refused():
    with pytest.raises(ValueError, match="k is 6, but there are 5 questions"):
        CurriculumTable(5).sample(6)
    with pytest.raises(ValueError, match="k is 0"):
        CurriculumTable(5).sample(0)
    assert CurriculumTable(5).sample(6, replacement=True).shape == (6,)


def test_a_draw_and_an_update_of_1_8_million_questions_take_under_50_ms():
    # a stated requirement of the trainer, hence a timed test: the best of many runs in processor time. Other programs
    # still slow it down through shared memory bandwidth, for many seconds at a time, so the runs go on for two minutes
    table = CurriculumTable(1_800_000)
    torch.use_deterministic_algorithms(False)
    seconds = [math.inf]
    while (min(seconds) >= 0.050 and len(seconds) <= 200) or len(seconds) <= 20:
        start = time.process_time()
        ids = table.sample(256)
        table.update(ids, torch.rand(256))
        seconds.append(time.process_time() - start)
    print(f"1.8 million questions, draw 256 and update: best {1e3 * min(seconds):.1f} ms")
    assert min(seconds) < 0.050
