import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from expo_kernels import linear_token_logps, reference, token_logps
from tests.numerics import make_batch, relative_error

GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)


def test_odds_of_three_to_one():
    logits = torch.tensor([[[math.log(3), 0.0]]])
    logps, entropies = token_logps(logits, torch.tensor([[0]]), return_entropy=True)
    assert logps.item() == pytest.approx(math.log(0.75))
    assert entropies.item() == pytest.approx(0.5623351446188083)
    assert token_logps(logits, torch.tensor([[0]]), temperature=0.5).item() == pytest.approx(math.log(0.9))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(return_entropy, return_lse, softcap):
    batch = make_batch(2, 3, 4, 5)
    options = {"mask": batch.completion_mask, "temperature": 0.7, "logit_softcap": softcap}
    options |= {"return_entropy": return_entropy, "return_lse": return_lse}
    logits = batch.logits.requires_grad_()
    assert gradcheck(lambda x: token_logps(x, batch.completion_ids, **options), logits)
    states = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    # one row per chunk
    options["logits_budget_mb"] = 8 * 5 / 2**20
    assert gradcheck(lambda h, w, b: linear_token_logps(h, w, batch.completion_ids, bias=b, **options), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [2, 1003, 32768])
def test_logps_from_rounded_inputs_are_within_2e_5_nats(dtype, V):
    batch = make_batch(2, 16, 64, V, dtype=dtype)
    truth = reference.token_logps(
        batch.hidden.double() @ batch.weight.double().T + batch.bias.double(), batch.completion_ids, 1.0
    )
    logps = linear_token_logps(batch.hidden, batch.weight, batch.completion_ids, bias=batch.bias)
    assert logps.dtype == torch.float32
    assert (logps - truth).abs().max() <= 2e-5
    logits = (4 * torch.randn(2, 16, V)).to(dtype)
    truth = reference.token_logps(logits.double(), batch.completion_ids, 1.0)
    assert (token_logps(logits, batch.completion_ids) - truth).abs().max() <= 2e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_log_sum_exps_and_their_gradients_are_those_of_the_formula(return_entropy, softcap):
    batch = make_batch(3, 5, 8, 101, dtype=torch.float32)
    mask, ids = batch.completion_mask, batch.completion_ids
    states = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in states]
    logits = doubles[0] @ doubles[1].T + doubles[2]
    truth = [
        reference.token_logps(logits, ids, 0.7, softcap),
        *([reference.token_entropies(logits, 0.7, softcap)] if return_entropy else []),
        reference.log_sum_exps(logits, 0.7, softcap),
    ]
    made = linear_token_logps(
        *states[:2], ids, bias=states[2], mask=mask, temperature=0.7, logit_softcap=softcap,
        return_entropy=return_entropy, return_lse=True, logits_budget_mb=4 * 101 * 4 / 2**20,
    )  # fmt: skip
    for one, other in zip(made, truth, strict=True):
        torch.testing.assert_close(one.double(), other * mask, rtol=1e-6, atol=2e-6)
    for weights in ([0.0, 1e-1], [1.0, 1e-1], [1.0, -3.0]):  # of the other outputs, and of the z-loss
        losses = [
            sum(weights[0] * output.sum() for output in outputs[:-1]) + weights[1] * outputs[-1].square().sum()
            for outputs in (made, [output * mask for output in truth])
        ]
        grads = torch.autograd.grad(losses[0], states, retain_graph=True)
        true_grads = torch.autograd.grad(losses[1], doubles, retain_graph=True)
        for one, other in zip(grads, true_grads, strict=True):
            assert relative_error(one, other) <= 1e-5


def test_a_z_loss_alone_needs_no_log_prob():
    batch = make_batch(dtype=torch.float32)
    logits = batch.logits.requires_grad_()
    _, lse = token_logps(logits, batch.completion_ids, mask=batch.completion_mask, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), logits)
    expected = logits.detach().softmax(-1) * batch.completion_mask[..., None]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_log_sum_exps_keep_to_a_gradient_tolerance():
    batch = make_batch(4, 16, 8, 300, dtype=torch.float32)
    grads = []
    for tolerance in (0.0, 0.1):
        states = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        logps, lse = linear_token_logps(
            *states, batch.completion_ids, temperature=0.2, gradient_tolerance=tolerance, return_lse=True
        )
        grads.append(torch.autograd.grad((logps + 0.1 * lse.square()).sum(), states))
    for exact, approximate in zip(*grads, strict=True):
        assert relative_error(approximate, exact) <= 0.1


def test_a_large_vocabulary_keeps_2e_5_nats():
    logits = 4 * torch.randn(8, 262_144)
    ids = torch.randint(0, 262_144, (8,))
    truth = reference.token_logps(logits.double(), ids, 1.0)
    assert (token_logps(logits, ids) - truth).abs().max() <= 2e-5


def test_a_narrow_head_is_widened_block_by_block(monkeypatch):
    batch = make_batch(2, 3, 8, 101, dtype=torch.bfloat16)
    whole = linear_token_logps(batch.hidden, batch.weight, batch.completion_ids)
    monkeypatch.setattr("expo_kernels._launch.WIDEN_BYTES", 4 * 8 * 7)
    torch.testing.assert_close(
        linear_token_logps(batch.hidden, batch.weight, batch.completion_ids), whole, rtol=0, atol=1e-6
    )


@given(shift=st.floats(-100, 100), seed=st.integers(0, 99))
def test_adding_a_constant_to_a_row_changes_nothing(shift, seed):
    batch = make_batch(seed=seed)
    shifted = batch.logits + shift
    for made, truth in zip(
        token_logps(shifted, batch.completion_ids, return_entropy=True),
        token_logps(batch.logits, batch.completion_ids, return_entropy=True),
        strict=True,
    ):
        torch.testing.assert_close(made, truth, rtol=0, atol=1e-11)


@given(garbage=st.sampled_from(GARBAGE), bad_id=st.sampled_from([-100, 13, 10**9]), seed=st.integers(0, 20))
def test_masked_contents_never_matter(garbage, bad_id, seed):
    batch = make_batch(dtype=torch.float32, seed=seed)

    def outcome(hidden, ids):
        hidden = hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        pair = linear_token_logps(hidden, weight, ids, mask=batch.completion_mask, return_entropy=True)
        (pair[0].sum() + 0.3 * pair[1].sum()).backward()
        return *pair, hidden.grad, weight.grad

    padding = ~batch.completion_mask
    dirty = outcome(
        batch.hidden.masked_fill(padding[..., None], garbage), batch.completion_ids.masked_fill(padding, bad_id)
    )
    clean = outcome(batch.hidden, batch.completion_ids)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))
    assert clean[0][padding].eq(0).all()
    assert clean[2][padding].eq(0).all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]).requires_grad_()
    logps, entropies, lse = token_logps(logits, torch.tensor([1, 0]), return_entropy=True, return_lse=True)
    assert lse.tolist() == pytest.approx([1e4, -1e4 + math.log(3)], abs=1e-3)
    assert logps.tolist() == pytest.approx([-2e4, -math.log(3)])
    assert entropies.tolist() == pytest.approx([0.0, math.log(3)])
    (logps.sum() + entropies.sum()).backward()
    assert logits.grad.tolist() == [pytest.approx([-1.0, 1.0, 0.0]), pytest.approx([2 / 3, -1 / 3, -1 / 3])]


def test_a_padded_vocabulary_column_of_minus_infinity_counts_as_nothing():
    logits = torch.tensor([[1.0, 0.0, -float("inf")]]).requires_grad_()
    logps, entropies = token_logps(logits, torch.tensor([0]), return_entropy=True)
    short = torch.tensor([[1.0, 0.0]]).requires_grad_()
    short_pair = token_logps(short, torch.tensor([0]), return_entropy=True)
    assert (logps.item(), entropies.item()) == pytest.approx(tuple(x.item() for x in short_pair))
    (logps + entropies).sum().backward()
    (short_pair[0] + short_pair[1]).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([*short.grad[0].tolist(), 0.0])


def test_strided_logits_give_equal_bits():
    logits = torch.randn(2, 5, 7).transpose(0, 1)[:, :, 1:].transpose(0, 1)
    ids = torch.randint(0, 6, (2, 5))
    torch.testing.assert_close(token_logps(logits, ids), token_logps(logits.contiguous(), ids), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_chunked_backward_equals_autograd(rows):
    batch = make_batch(2, 16, 8, 50, dtype=torch.float32)
    states = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight)]
    budget = rows * 50 * 4 / 2**20
    logps = linear_token_logps(*states, batch.completion_ids, logits_budget_mb=budget, temperature=0.8)
    upstream = torch.randn(2, 16)
    made = torch.autograd.grad(logps, states, upstream)
    doubles = [tensor.detach().double().requires_grad_() for tensor in states]
    truth = reference.token_logps(doubles[0] @ doubles[1].T, batch.completion_ids, 0.8)
    for a, b in zip(made, torch.autograd.grad(truth, doubles, upstream.double()), strict=True):
        assert relative_error(a, b) <= 1e-5
