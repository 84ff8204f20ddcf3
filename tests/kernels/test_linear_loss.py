import dataclasses

import pytest
import torch
from torch.autograd import gradcheck

from expo_kernels import Objective, _head, _launch, _products, expo_loss, linear_expo_loss, linear_token_logps
from tests.kernels.test_policy_loss import OBJECTIVES
from tests.numerics import make_batch, relative_error

EXTRA = [
    Objective(),
    Objective(ratio="sequence", aggregation="token"),
    Objective(rollout_correction="sequence"),
    Objective(logit_softcap=1.5, temperature=0.7, aggregation="constant", max_completion_length=9),
]


def budget_of(rows, V, itemsize, buffers=1):
    return rows * V * itemsize * buffers / 2**20


def run(batch, objective=None, *, requires_grad=True, **options):
    objective = Objective() if objective is None else objective
    states = [tensor.clone().requires_grad_(requires_grad) for tensor in (batch.hidden, batch.weight, batch.bias)]
    out = linear_expo_loss(
        *states[:2], batch.completion_ids, batch.completion_mask, bias=states[2], objective=objective,
        **(batch.loss_inputs(objective) | options),
    )  # fmt: skip
    if requires_grad:
        out.loss.backward()
    return out, [state.grad for state in states]


def true_gradients(batch, objective=None, **options):
    doubles = dataclasses.replace(batch, hidden=batch.hidden.double(), weight=batch.weight.double())
    doubles.bias = batch.bias.double()
    states = [tensor.clone().requires_grad_() for tensor in (doubles.hidden, doubles.weight, doubles.bias)]
    objective = Objective() if objective is None else objective
    out = expo_loss(
        states[0] @ states[1].T + states[2], batch.completion_ids, batch.completion_mask, objective=objective,
        **(batch.loss_inputs(objective) | options),
    )  # fmt: skip
    out.loss.backward()
    return out, [state.grad for state in states]


@pytest.mark.parametrize("objective", OBJECTIVES[::5] + EXTRA)
def test_it_is_the_loss_on_logits(objective):
    batch = make_batch(B=3, T=4)
    # two rows per chunk
    out, grads = run(batch, objective, logits_budget_mb=budget_of(2, 13, 8, 2 if objective.logit_softcap else 1))
    truth, true_grads = true_gradients(batch, objective)
    torch.testing.assert_close(out.loss, truth.loss, rtol=1e-12, atol=1e-14)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-10, atol=1e-14)
    for name, value in truth.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", EXTRA)
def test_gradcheck(objective):
    batch = make_batch(2, 3, 4, 5, spread=0.05)
    states = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    inputs = batch.loss_inputs(objective) | {"beta": 0.1, "logits_budget_mb": budget_of(2, 5, 8)}

    def loss(hidden, weight, bias):
        return linear_expo_loss(
            hidden, weight, batch.completion_ids, batch.completion_mask, bias=bias, objective=objective, **inputs
        ).loss

    assert gradcheck(loss, states)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=["float32", "bfloat16"]
)
def test_gradients_are_exact_whatever_the_number_of_chunks(dtype, bound):
    batch = make_batch(8, 32, 64, 257, dtype=dtype)
    batch.completion_mask[:] = True
    _, true_grads = true_gradients(batch)
    for num_chunks in (1, 2, 8, 64, 256):
        _, grads = run(batch, logits_budget_mb=budget_of(256 // num_chunks, 257, 4))
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert grad.dtype == dtype
            assert relative_error(grad, true_grad) <= bound


def test_a_scaled_bfloat16_gradient_is_rounded_once():
    batch = make_batch(8, 32, 64, 257, dtype=torch.bfloat16)
    states = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight)]
    out = linear_expo_loss(*states, batch.completion_ids, batch.completion_mask, **batch.loss_inputs(Objective()))
    (out.loss / 3).backward()
    hidden, weight = (tensor.detach() for tensor in states)
    _, true_grads = true_gradients(dataclasses.replace(batch, hidden=hidden, weight=weight, bias=torch.zeros(257)))
    for state, true_grad in zip(states, true_grads[:2], strict=True):
        assert relative_error(state.grad, true_grad / 3) <= 2e-3


@pytest.mark.parametrize("objective", EXTRA)
@pytest.mark.parametrize("num_chunks", [1, 2, 7, 24])
def test_first_step_ratios_are_exactly_one_and_kl_exactly_zero(objective, num_chunks):
    batch = make_batch(4, 6, 32, 1003, dtype=torch.float32)
    batch.completion_mask[:] = True
    budget = budget_of(-(-24 // num_chunks), 1003, 4, 2 if objective.logit_softcap else 1)
    with torch.no_grad():
        old = linear_token_logps(
            batch.hidden, batch.weight, batch.completion_ids, bias=batch.bias, mask=batch.completion_mask,
            temperature=objective.temperature, logit_softcap=objective.logit_softcap, logits_budget_mb=budget,
        )  # fmt: skip
    same = {"old_logps": old, "ref_logps": old}
    if objective.rollout_correction:
        same["rollout_logps"] = old
    out, _ = run(batch, objective, logits_budget_mb=budget, **same)
    assert torch.equal(out.logps, old)
    assert out.metrics["ratio_max"] == 1
    assert out.metrics["ratio_mean"] == 1
    assert out.metrics["kl"] == 0


@pytest.mark.parametrize("objective", EXTRA)
def test_masked_contents_never_matter(objective):
    batch = make_batch(dtype=torch.float32)
    padding = ~batch.completion_mask
    clean_out, clean_grads = run(batch, objective)
    for garbage, bad_id in ((float("nan"), -100), (float("inf"), 10**9), (-1e30, 13)):
        dirty = dataclasses.replace(
            batch,
            hidden=batch.hidden.masked_fill(padding[..., None], garbage),
            completion_ids=batch.completion_ids.masked_fill(padding, bad_id),
            old_logps=batch.old_logps.masked_fill(padding, garbage),
            ref_logps=batch.ref_logps.masked_fill(padding, garbage),
            rollout_logps=batch.rollout_logps.masked_fill(padding, garbage),
        )
        out, grads = run(dirty, objective)
        assert torch.equal(out.loss, clean_out.loss)
        assert all(torch.equal(out.metrics[name], clean_out.metrics[name]) for name in out.metrics)
        assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads, strict=True))
    assert clean_grads[0][padding].eq(0).all()


def test_packed_equals_padded():
    batch = make_batch(dtype=torch.float32)
    mask = batch.completion_mask
    padded, (padded_hidden, padded_weight, _) = run(batch)
    packed_batch = dataclasses.replace(
        batch, hidden=batch.hidden[mask], completion_ids=batch.completion_ids[mask], old_logps=batch.old_logps[mask],
        ref_logps=batch.ref_logps[mask], completion_mask=torch.ones(int(mask.sum())),
    )  # fmt: skip
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    packed, (packed_hidden, packed_weight, _) = run(packed_batch, cu_seqlens=cu_seqlens)
    assert torch.equal(packed.loss, padded.loss)
    assert torch.equal(packed_hidden, padded_hidden[mask])
    assert torch.equal(packed_weight, padded_weight)


def count_products(monkeypatch):
    """Count the calls of each product with [n, V] logits."""
    counts = {"write": 0, "accumulate": 0}
    for owner, method, name in (
        (_products.WideProducts, "write_logits", "write"),
        (_head.LinearHead, "accumulate_grads", "accumulate"),
    ):
        original = getattr(owner, method)

        def counted(self, *arguments, name=name, original=original):
            counts[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, counted)
    return counts


def test_under_no_grad_only_the_logits_are_made(monkeypatch):
    batch = make_batch(dtype=torch.float32)
    truth, _ = run(batch)
    counts = count_products(monkeypatch)
    with torch.no_grad():
        out, _ = run(batch, requires_grad=False)
        weight = batch.weight.clone().requires_grad_()
        linear_expo_loss(
            batch.hidden, weight, batch.completion_ids, batch.completion_mask, **batch.loss_inputs(Objective())
        )
    assert counts == {"write": 2, "accumulate": 0}
    assert torch.equal(out.loss, truth.loss)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_costs_no_gradient(frozen, monkeypatch):
    batch = make_batch(dtype=torch.float32)
    _, full_grads = run(batch)
    made = []
    original = _head.LinearHead.gradients
    monkeypatch.setattr(_head.LinearHead, "gradients", lambda self: made.append(original(self)) or made[-1])
    states = [batch.hidden.clone(), batch.weight.clone()]
    states[1 - frozen].requires_grad_()
    out = linear_expo_loss(
        *states, batch.completion_ids, batch.completion_mask, bias=batch.bias, **batch.loss_inputs(Objective())
    )
    out.loss.backward()
    assert made[0][frozen] is None
    assert torch.equal(states[1 - frozen].grad, full_grads[1 - frozen])


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_hidden_and_head_may_differ_in_dtype(hidden_dtype, weight_dtype, monkeypatch):
    monkeypatch.setattr("expo_kernels._launch.WIDEN_BYTES", 4 * 8 * 5)
    batch = make_batch(dtype=torch.bfloat16)
    batch.hidden, batch.weight = batch.hidden.to(hidden_dtype), batch.weight.to(weight_dtype)
    _, grads = run(batch)
    _, true_grads = true_gradients(batch)
    for grad, true_grad, dtype in zip(grads[:2], true_grads[:2], (hidden_dtype, weight_dtype), strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) <= (2e-3 if dtype == torch.bfloat16 else 1e-5)


def test_a_weight_may_be_rounded_in_the_call_while_its_gradient_is_not():
    batch = make_batch(8, 32, 64, 257, dtype=torch.bfloat16)
    master = torch.randn(257, 64).mul_(0.1).requires_grad_()
    hidden = batch.hidden.requires_grad_()
    inputs = batch.loss_inputs(Objective())

    def gradients(weight, **options):
        master.grad = hidden.grad = None
        out = linear_expo_loss(hidden, weight, batch.completion_ids, batch.completion_mask, **inputs, **options)
        (out.loss / 3).backward()
        return out, hidden.grad, master.grad

    cast, cast_hidden, cast_weight = gradients(master.to(torch.bfloat16))
    out, hidden_grad, weight_grad = gradients(master, weight_dtype=torch.bfloat16)
    assert torch.equal(out.loss, cast.loss)
    assert torch.equal(out.logps, cast.logps)
    assert torch.equal(hidden_grad, cast_hidden)
    assert weight_grad.dtype == torch.float32
    rounded = master.detach().bfloat16()
    exact = dataclasses.replace(batch, hidden=hidden.detach(), weight=rounded, bias=torch.zeros(257))
    _, (_, true_grad, _) = true_gradients(exact)
    # on a GPU, dL/dlogits are bfloat16
    bound = 2e-3 if _launch._switch.kernels_on_cpu else 1e-5
    assert relative_error(weight_grad, true_grad / 3) <= bound
    assert relative_error(cast_weight, true_grad / 3) > 1e-3


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", TypeError), (torch.float64, ValueError)])
def test_a_dtype_that_a_weight_cannot_be_rounded_to_is_refused(dtype, error):
    batch = make_batch()
    with pytest.raises(error, match=r"weight_dtype is .*; expected"):
        run(batch, weight_dtype=dtype)


def test_tied_weights_add_up():
    batch = make_batch(2, 3, 8, 13)
    weight = batch.weight.requires_grad_()
    ids = batch.completion_ids

    def loss(head):
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        return linear_expo_loss(hidden, head, ids, batch.completion_mask, advantages=batch.advantages, beta=0.0).loss

    tied = torch.autograd.grad(loss(weight), weight)[0]
    head = weight.detach().clone().requires_grad_()
    through_embedding, through_head = torch.autograd.grad(loss(head), (weight, head))
    torch.testing.assert_close(tied, through_embedding + through_head)


@pytest.mark.parametrize("B", [0, 3])
def test_a_batch_without_tokens_is_a_connected_zero(B):
    hidden = torch.full((B, 4, 5), float("nan"), requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=True)
    mask = torch.zeros(B, 4, dtype=torch.bool)
    out = linear_expo_loss(hidden, weight, torch.full((B, 4), -100), mask, advantages=torch.ones(B), beta=0.0)
    out.loss.backward()
    assert out.loss == 0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_backward_scales_by_the_incoming_gradient_and_may_run_twice():
    batch = make_batch(dtype=torch.float32)
    _, once = run(batch)
    states = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
    out = linear_expo_loss(
        *states, batch.completion_ids, batch.completion_mask, bias=batch.bias, **batch.loss_inputs(Objective())
    )
    scaled = out.loss * 3
    scaled.backward(retain_graph=True)
    scaled.backward()
    for state, grad in zip(states, once[:2], strict=True):
        torch.testing.assert_close(state.grad, 6 * grad)


def test_strided_hidden_is_the_same_as_contiguous():
    batch = make_batch(dtype=torch.float32)
    _, grads = run(batch)
    wide = torch.randn(4, 9, 8)
    wide[:, 2:8] = batch.hidden
    wide.requires_grad_()
    out = linear_expo_loss(
        wide[:, 2:8], batch.weight, batch.completion_ids, batch.completion_mask, bias=batch.bias,
        **batch.loss_inputs(Objective()),
    )  # fmt: skip
    out.loss.backward()
    assert torch.equal(wide.grad[:, 2:8], grads[0])


def test_autocast_does_not_round_the_logits():
    batch = make_batch(dtype=torch.float32)
    truth, true_grads = run(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(batch)
    assert torch.equal(out.loss, truth.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, true_grads, strict=True))


@pytest.mark.slow
def test_a_sequence_beyond_65_535_tokens_with_more_than_2_to_the_31_logits():
    T, V, H = 70_000, 32_768, 4
    assert T > 65_535
    assert T * V > 2**31
    weight = torch.randn(V, H)
    ids = torch.randint(V, (1, T))
    hidden = torch.randn(1, T, H)

    def loss_of(rows):
        part = hidden[:, rows].clone().requires_grad_()
        logps = linear_token_logps(hidden[:, rows], weight, ids[:, rows])
        out = linear_expo_loss(
            part, weight, ids[:, rows], torch.ones_like(ids[:, rows]), advantages=torch.tensor([0.7]),
            old_logps=logps + 0.1, ref_logps=logps - 0.1, objective=Objective(aggregation="token"), normalizer=float(T),
        )  # fmt: skip
        out.loss.backward()
        return out, part.grad

    whole, gradient = loss_of(slice(None))
    assert torch.isfinite(whole.loss)
    for rows in (slice(0, 40), slice(65_520, 65_560), slice(T - 40, T)):
        part, part_gradient = loss_of(rows)
        torch.testing.assert_close(whole.logps[:, rows], part.logps, atol=2e-5, rtol=0)
        assert relative_error(gradient[:, rows], part_gradient) < 1e-5


def test_two_runs_give_equal_bits():
    batch = make_batch(8, 32, 64, 1003, dtype=torch.float32)
    budget = budget_of(50, 1003, 4)
    first, first_grads = run(batch, logits_budget_mb=budget)
    second, second_grads = run(batch, logits_budget_mb=budget)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


def test_beta_and_normalizer_may_be_tensors():
    batch = make_batch(dtype=torch.float32)
    numbers, _ = run(batch, beta=0.05, normalizer=9)
    tensors, _ = run(batch, beta=torch.tensor(0.05), normalizer=torch.tensor(9.0))
    assert torch.equal(numbers.loss, tensors.loss)
