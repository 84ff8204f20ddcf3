import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_kernels import (
    LinearExpoLoss,
    Objective,
    _kept_columns,
    _kept_columns_gpu,
    _products,
    linear_expo_loss,
    linear_token_logps,
)
from tests.kernels.test_policy_loss import AGGREGATIONS, OBJECTIVES
from tests.numerics import make_batch, relative_error

ALL = OBJECTIVES + AGGREGATIONS + [Objective(surrogate=name) for name in ("gmpo", "vespo")]
ROUNDING = 1e-12  # of float64 products


def peaked_batch(B=3, T=7, H=16, V=600, *, logit_std=6.0, **options):
    """Inputs with most probability on few columns, and chosen columns drawn from it."""
    batch = make_batch(B, T, H, V, **options)
    batch.weight *= logit_std
    probs = torch.softmax(batch.logits.double(), -1)
    ids = torch.multinomial(probs.view(-1, V), 1, generator=torch.Generator().manual_seed(1)).view(B, T)
    logps = probs.log().gather(-1, ids[..., None]).squeeze(-1)
    # the differences between the policies stay those of make_batch
    others = {
        name: (logps + 0.3 * torch.sin(getattr(batch, name).double())).to(getattr(batch, name).dtype)
        for name in ("old_logps", "ref_logps", "rollout_logps")
    }
    return dataclasses.replace(batch, completion_ids=ids, **others)


def run(batch, tolerance, objective=None, *, wants=(True, True, True), rows=None, **options):
    objective = Objective() if objective is None else objective
    given = (batch.hidden, batch.weight, batch.bias)
    states = [tensor.clone().requires_grad_(wanted) for tensor, wanted in zip(given, wants, strict=True)]
    budget = None if rows is None else rows * batch.weight.shape[0] * 8 / 2**20
    out = linear_expo_loss(
        *states[:2], batch.completion_ids, batch.completion_mask, bias=states[2], objective=objective,
        gradient_tolerance=tolerance, logits_budget_mb=budget, **(batch.loss_inputs(objective) | options),
    )  # fmt: skip
    out.loss.backward()
    return out, [state.grad for state in states]


def assert_within(out, grads, exact_grads, tolerance):
    bound = float(out.metrics["gradient_error_bound"])
    assert bound <= tolerance
    for grad, exact in zip(grads[:2], exact_grads[:2], strict=True):
        if exact is not None:
            assert (grad - exact).norm() <= (bound + ROUNDING) * exact.norm()


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(ALL),
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4]),
    logit_std=st.floats(0.1, 12.0),
    rows=st.sampled_from([2, 5, None]),
    wants=st.sampled_from([(True, True, True), (True, False, False), (False, True, True), (True, True, False)]),
    bonus=st.sampled_from([0.0, 0.01]),
    mask=st.integers(0, 2**21 - 1),
    seed=st.integers(0, 99),
)
def test_errors_stay_below_the_bound_and_the_tolerance(objective, tolerance, logit_std, rows, wants, bonus, mask, seed):
    batch = peaked_batch(logit_std=logit_std, seed=seed)
    batch.completion_mask = torch.tensor([mask >> place & 1 for place in range(21)]).view(3, 7) != 0
    options = {"wants": wants, "rows": rows, "entropy_bonus": bonus, "return_entropy": True}
    exact, exact_grads = run(batch, 0.0, objective, **options)
    out, grads = run(batch, tolerance, objective, **options)
    assert_within(out, grads, exact_grads, tolerance)
    assert torch.equal(out.loss, exact.loss)
    assert torch.equal(out.logps, exact.logps)
    assert all(torch.equal(out.metrics[name], value) for name, value in exact.metrics.items())
    assert out.metrics.keys() - exact.metrics.keys() == {"gradient_error_bound", "kept_columns"}
    torch.testing.assert_close(grads[2], exact_grads[2], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("least_lazy_bytes", [1, 2**40])
def test_few_columns_are_kept_and_two_runs_give_equal_bits(monkeypatch, least_lazy_bytes):
    monkeypatch.setattr(_products, "LEAST_LAZY_BYTES", least_lazy_bytes)
    batch = peaked_batch(V=4000, dtype=torch.float32)
    _, exact = run(batch, 0.0)
    (out, grads), (_, again) = run(batch, 1e-2), run(batch, 1e-2)
    assert 0 < out.metrics["kept_columns"] < 0.2
    assert not torch.equal(grads[1], exact[1])
    assert (grads[1] == 0).all(dim=1).double().mean() > 0.8
    assert all(torch.equal(first, second) for first, second in zip(grads, again, strict=True))


def test_packed_rows_a_softcap_and_a_narrow_head():
    objective = Objective(logit_softcap=20.0, temperature=0.7)
    batch = peaked_batch(V=2000)
    weight = batch.weight.bfloat16()
    mask, lengths = batch.completion_mask, batch.completion_mask.sum(1)
    inputs = {name: value[mask] if value.dim() == 2 else value for name, value in batch.loss_inputs(objective).items()}
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    grads = []
    for tolerance in (0.0, 1e-2):
        hidden, head = batch.hidden[mask].float().requires_grad_(), weight.clone().requires_grad_()
        packed = hidden, head, batch.completion_ids[mask], mask[mask]
        out = linear_expo_loss(*packed, objective=objective, cu_seqlens=starts, gradient_tolerance=tolerance, **inputs)
        out.loss.backward()
        grads.append((hidden.grad, head.grad.float()))
    assert 0 < out.metrics["gradient_error_bound"] <= 1e-2
    assert 0 < out.metrics["kept_columns"] < 0.5
    assert relative_error(grads[1][0], grads[0][0]) <= float(out.metrics["gradient_error_bound"])
    # rounded to bfloat16
    assert relative_error(grads[1][1], grads[0][1]) <= float(out.metrics["gradient_error_bound"]) + 2e-3


@pytest.mark.parametrize("with_entropies", [False, True])
def test_gradients_of_log_probs(with_entropies):
    batch = peaked_batch(V=4000)
    made = []
    for tolerance in (0.0, 1e-2):
        states = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
        outputs = linear_token_logps(
            *states, batch.completion_ids, mask=batch.completion_mask, return_entropy=with_entropies,
            gradient_tolerance=tolerance,
        )  # fmt: skip
        logps, entropies = outputs if with_entropies else (outputs, torch.zeros(()))
        (logps * batch.advantages[:, None] + 0.1 * entropies).sum().backward()
        made.append((logps.detach(), [state.grad for state in states]))
    (exact_logps, exact), (logps, grads) = made
    assert torch.equal(logps, exact_logps)
    assert not torch.equal(grads[1], exact[1])
    assert all(relative_error(grad, truth) <= 1e-2 for grad, truth in zip(grads, exact, strict=True))


def test_equal_probabilities_take_the_dense_products():
    batch = peaked_batch(V=2000, logit_std=1e-3, dtype=torch.float32)
    batch.bias.zero_()
    _, exact = run(batch, 0.0)
    out, grads = run(batch, 1e-2)
    assert out.metrics["kept_columns"] == 1
    assert out.metrics["gradient_error_bound"] == 0
    assert all(torch.equal(grad, truth) for grad, truth in zip(grads, exact, strict=True))


def test_columns_are_added_where_dhidden_is_smaller_than_estimated(monkeypatch):
    batch = peaked_batch(V=2000)
    levels = []
    level_for = _kept_columns.KeptColumns.level_for

    def spied(self, chunk_levels, level, grad_hidden):
        made = level_for(self, chunk_levels, level, grad_hidden)
        levels.append((level, made))
        return made

    monkeypatch.setattr(_kept_columns.KeptColumns, "level_for", spied)
    monkeypatch.setattr(_kept_columns, "FIRST_HIDDEN_SHARE", 50.0)
    _, exact = run(batch, 0.0, wants=(True, False, False))
    out, grads = run(batch, 1e-3, wants=(True, False, False))
    assert any(made > level for level, made in levels)
    assert_within(out, grads, exact, 1e-3)


def test_chunks_that_cancel_are_computed_again_in_full():
    batch = peaked_batch(B=2, T=8, V=2000)
    for name in ("hidden", "completion_ids", "old_logps", "ref_logps"):
        getattr(batch, name)[1] = getattr(batch, name)[0]
    batch.completion_mask[:] = True
    batch.advantages[:] = torch.tensor([1.0, -1.0])
    options = {"rows": 8, "beta": 0.0, "ref_logps": None, "old_logps": None}
    # the second reply's gradient of the weight is minus the first's, but for a thousandth
    batch.advantages[1] *= 1 + 1e-3
    _, exact = run(batch, 0.0, **options)
    out, grads = run(batch, 1e-2, **options)
    assert_within(out, grads, exact, 1e-2)
    assert out.metrics["kept_columns"] == 1


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("module", [_kept_columns, _kept_columns_gpu])
def test_distances_from_the_mean_row_are_never_too_small(module, spread):
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(4096, generator=generator).abs()
    weight = common + spread * torch.randn(512, 4096, generator=generator)
    dtype = [torch.float32] if module is _kept_columns else []
    mean, distances = module._distances_from_mean(weight, *dtype)
    exact = (weight.double() - mean.double()).norm(dim=1)
    assert (distances.double() >= exact).all()
    # and not larger by more than rounding explains
    assert (distances.double() ** 2 <= exact**2 + 5e-3 * weight.double().square().sum(1)).all()


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan, "small", None])
def test_tolerances_out_of_range_are_refused(bad):
    batch = peaked_batch()
    with pytest.raises((ValueError, TypeError), match="gradient_tolerance is"):
        run(batch, bad)


def test_nothing_is_valid_or_nothing_has_a_gradient():
    batch = peaked_batch()
    out, grads = run(batch, 1e-2, beta=0.0, advantages=torch.zeros(3, dtype=torch.float64))
    assert all((grad == 0).all() for grad in grads)
    assert out.metrics["gradient_error_bound"] == 0
    batch.completion_mask[:] = False
    out, grads = run(batch, 1e-2)
    assert all((grad == 0).all() for grad in grads)
    assert out.metrics["gradient_error_bound"] == 0


def test_gradients_that_are_not_finite_are_kept():
    batch = peaked_batch(V=2000)
    batch.completion_mask[:] = True
    batch.advantages[0] = math.nan
    _, grads = run(batch, 1e-2)
    assert grads[0][0].isnan().any()
    assert grads[0][1:].isfinite().all()


def test_the_module_has_a_tolerance():
    batch = peaked_batch(V=2000)
    module = LinearExpoLoss(gradient_tolerance=1e-2)
    call = (batch.hidden, batch.weight.requires_grad_(), batch.completion_ids, batch.completion_mask)
    inputs = batch.loss_inputs(Objective())
    assert module(*call, **inputs).metrics["gradient_error_bound"] > 0
    assert "gradient_error_bound" not in module(*call, **inputs, gradient_tolerance=0.0).metrics
    assert repr(module) == f"LinearExpoLoss({Objective()!r}, gradient_tolerance=0.01)"


# --- rows without a gradient


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_rows_without_a_gradient_join_no_gradient_product(tolerance, monkeypatch):
    monkeypatch.setattr(_products, "LEAST_MOVED", 1)
    monkeypatch.setattr(_products, "ROWS_MOVED_AT_ONCE", 3)
    batch = peaked_batch(B=4, T=8, V=4000)
    batch.completion_mask[:] = True
    batch.advantages[1:3] = 0.0
    num_rows = []

    def counted(total, grad_logits, weight, add=_products.add_to_hidden):
        num_rows.append(len(grad_logits))
        add(total, grad_logits, weight)

    def seen(self, grads, choose=_kept_columns.KeptColumns.choose):
        num_rows.append(len(grads.scale))
        return choose(self, grads)

    monkeypatch.setattr(_products, "add_to_hidden", counted)
    monkeypatch.setattr(_kept_columns.KeptColumns, "choose", seen)
    options = {"beta": 0.0, "ref_logps": None, "old_logps": None}
    _, grads = run(batch, tolerance, **options)
    monkeypatch.setattr(_products, "LEAST_MOVED", 2**60)
    _, exact = run(batch, 0.0, **options)
    assert num_rows == [16, 32]
    for grad, truth in zip(grads, exact, strict=True):
        assert (grad - truth).norm() <= (tolerance + ROUNDING) * truth.norm()
    assert (grads[0][1:3] == 0).all()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9))
def test_rows_move_to_the_front(is_kept, at_once):
    values = torch.arange(2.0 * len(is_kept)).view(-1, 2)
    rows = torch.tensor(is_kept).nonzero().squeeze(1)
    expected = values[rows].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_products, "ROWS_MOVED_AT_ONCE", at_once)
        assert torch.equal(_products.compact_rows(values, rows), expected)


def test_lazy_zeros_are_zeros_that_may_be_written_and_outlive_their_maker():
    rows = _products.lazy_zeros((4097, 1024), torch.float32, torch.device("cpu"))
    rows[5] += 1.0
    part = rows[4:7].clone()
    assert rows.shape == (4097, 1024)
    assert (part.sum(1) == torch.tensor([0.0, 1024.0, 0.0])).all()
    view = rows[-1]
    del rows
    assert (view == 0).all()
