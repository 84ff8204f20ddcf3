"""The gradient tolerance of the kernels, run by Triton's interpreter; the truth is PyTorch in float64.

Run through `test_interpreter.py`.
"""

import itertools

import pytest
import torch

from expo_kernels import _kept_head, _launch, linear_expo_loss, linear_token_logps
from expo_kernels._triton.columns import launch_column_squares
from expo_kernels.objective import Objective
from tests.kernels.test_gradient_tolerance import peaked_batch
from tests.numerics import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.5e-3, F16: 4e-4, F32: 2e-5}


def run(batch, tolerance, objective=None, dtypes=(F32, F32), *, wants=(True, True), rows=None, kernels=True, **options):
    """The output, and the gradients of hidden states, weight and bias; in float64 by PyTorch without `kernels`."""
    objective = Objective() if objective is None else objective
    states = [
        tensor.to(dtype).to(dtype if kernels else torch.float64, copy=True).requires_grad_(wanted)
        for tensor, dtype, wanted in zip((batch.hidden, batch.weight), dtypes, wants, strict=True)
    ]
    bias = batch.bias.to(F32 if kernels else torch.float64, copy=True).requires_grad_()
    budget = None if rows is None else rows * batch.weight.shape[0] * 4 / 2**20
    out = linear_expo_loss(
        *states, batch.completion_ids, batch.completion_mask, bias=bias, objective=objective,
        gradient_tolerance=tolerance, logits_budget_mb=budget, **(batch.loss_inputs(objective) | options),
    )  # fmt: skip
    out.loss.backward()
    return out, [state.grad for state in (*states, bias)]


def check(batch, tolerance, objective=None, dtypes=(F32, F32), **options):
    """Errors are within the bound and the tolerance but for rounding, and nothing else changes."""
    _, truth = run(batch, 0.0, objective, dtypes, kernels=False, **options)
    exact, exact_grads = run(batch, 0.0, objective, dtypes, **options)
    out, grads = run(batch, tolerance, objective, dtypes, **options)
    assert torch.equal(out.loss, exact.loss)
    assert torch.equal(out.logps, exact.logps)
    assert all(torch.equal(out.metrics[name], value) for name, value in exact.metrics.items())
    assert torch.equal(grads[2], exact_grads[2])
    bound = float(out.metrics["gradient_error_bound"])
    assert bound <= tolerance
    for grad, right, dtype in zip(grads[:2], truth[:2], dtypes, strict=True):
        if grad is not None:
            assert relative_error(grad, right) <= bound + ROUNDING[dtype]
    return out, grads


@pytest.mark.parametrize("dtypes", list(itertools.product([BF16, F16, F32], repeat=2)))
def test_gradients_are_within_the_bound_in_every_dtype(dtypes):
    out, grads = check(peaked_batch(V=1500, dtype=F32), 3e-2, dtypes=dtypes, rows=8)
    assert out.metrics["gradient_error_bound"] > 0
    assert 0 < out.metrics["kept_columns"] < 0.5
    assert (grads[1] == 0).all(dim=1).double().mean() > 0.5


@pytest.mark.parametrize(
    ("tolerance", "objective", "options"),
    [
        (1e-1, Objective(ratio="sequence"), {}),
        (1e-1, Objective(ratio="sequence"), {"rows": 3}),
        (1e-2, Objective(logit_softcap=20.0, temperature=0.7), {"rows": 5}),
        (1e-2, Objective(aggregation="token", kl="k2"), {"wants": (True, False)}),
        (1e-2, Objective(), {"wants": (False, True), "rows": 4}),
        (1e-3, Objective(surrogate="cispo"), {"rows": 4}),
    ],
)
def test_objectives_chunks_and_frozen_inputs(tolerance, objective, options):
    out, _ = check(peaked_batch(V=1500, dtype=F32), tolerance, objective, (BF16, BF16), **options)
    assert out.metrics["kept_columns"] < 1


def test_two_runs_give_equal_bits():
    batch = peaked_batch(V=1500, dtype=F32)
    (_, grads), (_, again) = (run(batch, 1e-2, dtypes=(BF16, BF16), rows=5) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(grads, again, strict=True))


def test_masked_contents_never_matter():
    batch = peaked_batch(V=1500, dtype=F32)
    _, clean = run(batch, 1e-2, dtypes=(BF16, BF16), rows=5)
    batch.hidden[~batch.completion_mask] = float("nan")
    batch.completion_ids[~batch.completion_mask] = -100
    _, spoilt = run(batch, 1e-2, dtypes=(BF16, BF16), rows=5)
    assert all(torch.equal(first, second) for first, second in zip(clean, spoilt, strict=True))


@pytest.mark.parametrize("change", ["entropy bonus", "flat logits", "exponentials"])
def test_where_columns_cannot_be_left_out_the_bits_are_those_of_the_exact_path(change, monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", str(int(change == "exponentials")))
    batch = peaked_batch(V=1500, dtype=F32, logit_std=1e-3 if change == "flat logits" else 6.0)
    options = {"entropy_bonus": 0.01} if change == "entropy bonus" else {}
    _, exact = run(batch, 0.0, dtypes=(BF16, BF16), rows=8, **options)
    out, grads = run(batch, 1e-3, dtypes=(BF16, BF16), rows=8, **options)
    assert (out.metrics["gradient_error_bound"], out.metrics["kept_columns"]) == (0, 1)
    assert all(torch.equal(first, second) for first, second in zip(grads, exact, strict=True))


def test_a_bound_that_does_not_hold_makes_the_call_exact(monkeypatch):
    from expo_kernels import _kept_columns_gpu

    monkeypatch.setattr(_kept_columns_gpu, "FIRST_HIDDEN_SHARE", 1e3)
    monkeypatch.setattr(_kept_columns_gpu, "WEIGHT_SHARE", 1e3)
    batch = peaked_batch(V=1500, dtype=F32)
    exact, exact_grads = run(batch, 0.0, dtypes=(BF16, BF16))
    out, grads = run(batch, 1e-3, dtypes=(BF16, BF16))
    assert (out.metrics["gradient_error_bound"], out.metrics["kept_columns"]) == (0, 1)
    assert all(torch.equal(out.metrics[name], value) for name, value in exact.metrics.items())
    assert all(torch.equal(first, second) for first, second in zip(grads, exact_grads, strict=True))


@pytest.mark.parametrize("with_entropies", [False, True])
def test_gradients_of_log_probs(with_entropies):
    batch = peaked_batch(V=1500, dtype=F32)
    made = []
    for tolerance in (0.0, 1e-2):
        states = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
        outputs = linear_token_logps(
            *states, batch.completion_ids, mask=batch.completion_mask, return_entropy=with_entropies,
            gradient_tolerance=tolerance, logits_budget_mb=8 * 1500 * 4 / 2**20,
        )  # fmt: skip
        sum(output.sum() for output in (outputs if with_entropies else [outputs])).backward()
        made.append([state.grad for state in states])
    for exact, grad in zip(*made, strict=True):
        assert relative_error(grad, exact) <= 1e-2
        assert torch.equal(grad, exact) == with_entropies


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("V", [127, 384, 1000])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_column_squares(rows, V, dtype):
    grads = torch.randn(rows, V + 16).mul_(1e-25).to(dtype)[:, :V]
    unit = grads.float().abs().amax()
    truth = (grads.double() / unit.double()).square().sum(0)
    assert relative_error(launch_column_squares(grads, unit), truth) <= 1e-6


def test_products_of_a_chunk_are_launched_after_the_next_chunk_is_read(monkeypatch):
    order = []
    for name in ("choose", "record"):
        original = getattr(_kept_head.DeviceColumns, name)

        def recorded(self, *args, original=original, name=name):
            order.append(name)
            return original(self, *args)

        monkeypatch.setattr(_kept_head.DeviceColumns, name, recorded)
    batch = peaked_batch(V=1500, dtype=F32)
    num_chunks = -(-int(batch.completion_mask.sum()) // 5)
    monkeypatch.setattr(_launch, "row_multiple", lambda _: 1)
    run(batch, 1e-2, rows=5)
    assert order == ["choose"] + ["choose", "record"] * (num_chunks - 1) + ["record"]
