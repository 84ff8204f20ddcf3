import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from expo_kernels import Objective, expo_loss, expo_loss_from_logps, reference, token_logps
from tests.numerics import make_batch, oracle_loss, relative_error

OBJECTIVES = [
    Objective(ratio=ratio, surrogate=surrogate, kl=kl, kl_importance_weighted=weighted, rollout_correction=correction)
    for ratio, surrogate, kl, weighted, correction in itertools.product(
        ["token", "sequence"], ["clip", "cispo", "sapo"], ["k1", "k2", "k3"], [False, True], [None, "token", "sequence"]
    )
]
AGGREGATIONS = [
    Objective(clip_low=0.1, clip_high=0.3, dual_clip=1.3),
    Objective(aggregation="token", temperature=0.7),
    Objective(aggregation="constant", max_completion_length=9, logit_softcap=1.5, temperature=1.3),
    Objective(log_ratio_clamp=0.3),
]


def name_of(objective):
    """A test id from the fields that differ from the default; equal in every process."""
    fields = dataclasses.asdict(objective).items()
    return "-".join(f"{name}={value}" for name, value in fields if value != getattr(Objective(), name)) or "default"


def oracle(batch, logps, objective, *, old=True, ref=True, beta=0.1, normalizer=None):
    return oracle_loss(
        logps, batch.completion_mask, batch.advantages,
        batch.old_logps if old else None, batch.ref_logps if ref else None,
        batch.rollout_logps if objective.rollout_correction else None, beta, objective, normalizer,
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES + AGGREGATIONS, ids=name_of)
def test_every_objective_agrees_with_the_oracle(objective):
    batch = make_batch(B=3, T=4)
    logits = batch.logits.requires_grad_()
    logps = reference.token_logps(logits, batch.completion_ids, objective.temperature, objective.logit_softcap)
    truth = oracle(batch, logps, objective)
    (true_grad,) = torch.autograd.grad(truth, logits)
    out = expo_loss(
        logits, batch.completion_ids, batch.completion_mask, beta=0.1, objective=objective,
        **batch.loss_inputs(objective),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(out.loss, truth.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, true_grad, rtol=1e-10, atol=1e-14)
    leaf = logps.detach().requires_grad_()
    from_logps = expo_loss_from_logps(
        leaf, batch.completion_mask, beta=0.1, objective=objective, **batch.loss_inputs(objective)
    )
    torch.testing.assert_close(from_logps.loss, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence", kl="k2"), *AGGREGATIONS])
def test_gradcheck(objective):
    batch = make_batch(2, 3, 4, 5, spread=0.05)
    inputs = batch.loss_inputs(objective) | {"beta": 0.1, "objective": objective}
    logits = batch.logits.requires_grad_()
    mask = batch.completion_mask
    assert gradcheck(lambda x: expo_loss(x, batch.completion_ids, mask, **inputs).loss, logits)
    logps = token_logps(batch.logits.detach(), batch.completion_ids).requires_grad_()
    assert gradcheck(lambda x: expo_loss_from_logps(x, mask, **inputs).loss, logps)


@given(seed=st.integers(0, 50))
def test_on_policy_without_kl_the_gradient_is_minus_advantage_over_tokens(seed):
    batch = make_batch(seed=seed)
    logps = batch.old_logps.clone().requires_grad_()
    out = expo_loss_from_logps(
        logps, batch.completion_mask, advantages=batch.advantages, beta=0.0, objective=Objective(aggregation="token")
    )
    out.loss.backward()
    expected = -batch.advantages[:, None] * batch.completion_mask / batch.completion_mask.sum()
    torch.testing.assert_close(logps.grad, expected, rtol=1e-14, atol=0)
    assert out.metrics["ratio_mean"] == 1
    assert out.metrics["ratio_max"] == 1


@given(seed=st.integers(0, 50))
def test_beta_zero_ignores_the_reference(seed):
    batch = make_batch(seed=seed)
    logps = batch.old_logps + 0.1
    grads = []
    for ref in (None, batch.ref_logps):
        leaf = logps.clone().requires_grad_()
        out = expo_loss_from_logps(
            leaf, batch.completion_mask, advantages=batch.advantages, old_logps=batch.old_logps, ref_logps=ref, beta=0.0
        )
        out.loss.backward()
        grads.append((out.loss.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence", rollout_correction="sequence")])
@given(
    garbage=st.sampled_from([float("nan"), float("inf"), -float("inf"), -200.0, 1e30]),
    bad_id=st.sampled_from([-100, 13, 2**40]),
    seed=st.integers(0, 20),
)
def test_masked_contents_never_matter(objective, garbage, bad_id, seed):
    batch = make_batch(dtype=torch.float32, seed=seed)
    padding = ~batch.completion_mask
    per_token = batch.advantages[:, None].expand(padding.shape)

    def outcome(spoil, ids):
        logits = spoil(batch.logits).requires_grad_()
        inputs = {name: spoil(tensor) for name, tensor in batch.loss_inputs(objective).items() if tensor.dim() == 2}
        out = expo_loss(
            logits, ids, batch.completion_mask, **(inputs | {"advantages": spoil(per_token)}),
            objective=objective, return_entropy=True,
        )  # fmt: skip
        out.loss.backward()
        return [out.loss, out.logps, logits.grad, *out.metrics.values()]

    def spoil(tensor):
        mask = padding if tensor.dim() == 2 else padding[..., None]
        return tensor.masked_fill(mask, garbage)

    dirty = outcome(spoil, batch.completion_ids.masked_fill(padding, bad_id))
    clean = outcome(torch.clone, batch.completion_ids)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))
    assert clean[2][padding].eq(0).all()


def test_metrics_by_hand():
    logps = torch.tensor([[math.log(1.5), math.log(0.5), 0.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    out = expo_loss_from_logps(
        logps, mask, advantages=torch.tensor([[1.0, -1.0, 1.0, 1.0]]), old_logps=torch.zeros(1, 4),
        ref_logps=logps + torch.tensor([[0.0, 1.0, 0.0, 5.0]]),
    )  # fmt: skip
    expected = {
        "kl": (math.e - 2) / 3, "ratio_mean": 1.0, "ratio_max": 1.5, "clip_low_fraction": 1 / 3,
        "clip_high_fraction": 1 / 3, "tokens": 3,
    }  # fmt: skip
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad or value.dim() for value in out.metrics.values())
    assert out.logps.tolist()[0][3] == 0
    assert not out.logps.requires_grad


def test_entropy_of_a_uniform_model():
    out = expo_loss(
        torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), advantages=torch.ones(1),
        beta=0.0, return_entropy=True,
    )  # fmt: skip
    assert out.metrics["entropy"].item() == pytest.approx(math.log(8))


def test_rewards_stand_for_their_group_advantages():
    batch = make_batch(dtype=torch.float32)
    call = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps}
    logits, ids, mask = batch.logits, batch.completion_ids, batch.completion_mask
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    by_rewards = expo_loss(logits, ids, mask, rewards=rewards, group_size=2, **call)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    by_hand = expo_loss(logits, ids, mask, advantages=advantages, **call)
    torch.testing.assert_close(by_rewards.loss, by_hand.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(aggregation="token"),
        Objective(aggregation="constant", max_completion_length=7),
        Objective(ratio="sequence"),
    ],
)
def test_splitting_a_batch_keeps_loss_and_gradient(objective):
    batch = make_batch(dtype=torch.float32)
    batch.completion_mask[1] = False
    total = int(batch.completion_mask.sum()) if objective.aggregation == "token" else 4

    def run(rows, normalizer):
        logits = batch.logits[rows].clone().requires_grad_()
        inputs = {name: tensor[rows] for name, tensor in batch.loss_inputs(objective).items()}
        out = expo_loss(
            logits, batch.completion_ids[rows], batch.completion_mask[rows], objective=objective,
            normalizer=normalizer, **inputs,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach(), logits.grad

    whole_loss, whole_grad = run(slice(None), None)
    parts = [run(slice(0, 1), total), run(slice(1, 2), float(total)), run(slice(2, 4), torch.tensor(float(total)))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss, rtol=1e-6, atol=1e-7)
    assert relative_error(torch.cat([grad for _, grad in parts]), whole_grad) <= 1e-6


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence"), Objective(aggregation="token")])
@pytest.mark.parametrize("per_token", [False, True])
def test_packed_equals_padded(objective, per_token):
    batch = make_batch()
    batch.completion_mask[2] = False
    mask = batch.completion_mask
    inputs = batch.loss_inputs(objective)
    if per_token:
        inputs["advantages"] = torch.randn(mask.shape, dtype=torch.float64)
    logits = batch.logits.requires_grad_()
    padded = expo_loss(logits, batch.completion_ids, mask, objective=objective, **inputs)
    (padded_grad,) = torch.autograd.grad(padded.loss, logits)
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    packed_inputs = {name: tensor[mask] if tensor.dim() == 2 else tensor for name, tensor in inputs.items()}
    packed_logits = logits.detach()[mask].requires_grad_()
    packed = expo_loss(
        packed_logits, batch.completion_ids[mask], torch.ones(int(mask.sum())), objective=objective,
        cu_seqlens=cu_seqlens, **packed_inputs,
    )  # fmt: skip
    packed.loss.backward()
    assert torch.equal(packed.loss, padded.loss)
    assert torch.equal(packed.logps, padded.logps[mask])
    assert torch.equal(packed_logits.grad, padded_grad[mask])
    assert all(torch.equal(packed.metrics[name], padded.metrics[name]) for name in padded.metrics)


@pytest.mark.parametrize("B", [0, 3])
def test_a_batch_without_tokens_is_a_connected_zero(B):
    mask = torch.zeros(B, 4, dtype=torch.bool)
    logits = torch.full((B, 4, 5), float("nan"), requires_grad=True)
    out = expo_loss(logits, torch.full((B, 4), -100), mask, advantages=torch.ones(B), beta=0.0, return_entropy=True)
    out.loss.backward()
    logps = torch.full((B, 4), float("nan"), requires_grad=True)
    other = expo_loss_from_logps(logps, mask, advantages=torch.ones(B), beta=0.0)
    other.loss.backward()
    assert out.loss == 0
    assert other.loss == 0
    assert logits.grad.eq(0).all()
    assert logps.grad.eq(0).all()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence"), Objective(surrogate="cispo")])
@pytest.mark.parametrize("gap", [1e6, -1e6, float("inf"), -float("inf")])
def test_any_gap_between_policies_stays_finite(objective, gap):
    logits = torch.randn(2, 3, 7).requires_grad_()
    ids = torch.randint(0, 7, (2, 3))
    others = torch.full((2, 3), gap)
    out = expo_loss(
        logits, ids, torch.ones(2, 3), advantages=torch.tensor([1.0, -1.0]), old_logps=others, ref_logps=-others,
        objective=objective,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize(("kl", "penalty", "slope"), [("k1", 1e6, 1.0), ("k2", 5e11, 1e6)])
def test_a_large_gap_is_the_penalty_of_an_estimator_without_an_exp(kl, penalty, slope):
    logps = torch.zeros(2, 3).requires_grad_()
    out = expo_loss_from_logps(
        logps, torch.ones(2, 3), advantages=torch.zeros(2), ref_logps=torch.full((2, 3), -1e6), beta=1.0,
        objective=Objective(kl=kl, aggregation="token"),
    )  # fmt: skip
    out.loss.backward()
    assert out.metrics["kl"].item() == pytest.approx(penalty)
    assert out.loss.item() == pytest.approx(penalty)
    assert logps.grad.flatten().tolist() == pytest.approx([slope / 6] * 6)


@pytest.mark.parametrize(("T", "V"), [(1, 2), (5, 1003)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_awkward_sizes_and_extreme_logits(T, V, scale):
    logits = (scale * torch.randn(2, T, V).clamp(-1, 1)).requires_grad_()
    ids = torch.randint(0, V, (2, T))
    out = expo_loss(
        logits, ids, torch.ones(2, T), advantages=torch.tensor([1.0, -2.0]), ref_logps=torch.full((2, T), -1.0)
    )
    out.loss.backward()
    double = logits.detach().double().requires_grad_()
    logps = reference.token_logps(double, ids, 1.0)
    truth = oracle_loss(
        logps, torch.ones(2, T), torch.tensor([1.0, -2.0]), None, torch.full((2, T), -1.0), None, 0.02, Objective()
    )
    truth.backward()
    assert relative_error(logits.grad, double.grad) <= 1e-5
    torch.testing.assert_close(out.loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)


def test_backward_scales_by_the_incoming_gradient_and_may_run_twice():
    batch = make_batch(dtype=torch.float32)
    call = batch.loss_inputs(Objective())

    def grad_of(factor, times=1):
        logits = batch.logits.requires_grad_()
        loss = expo_loss(logits, batch.completion_ids, batch.completion_mask, **call).loss * factor
        for turn in range(times):
            loss.backward(retain_graph=turn < times - 1)
        return logits.grad

    once = grad_of(1.0)
    torch.testing.assert_close(grad_of(-3.0), -3.0 * once)
    torch.testing.assert_close(grad_of(1.0, times=2), 2 * once)
    torch.testing.assert_close(grad_of(0.5, times=3), 1.5 * once)


def test_the_callers_logits_are_overwritten_only_inplace():
    batch = make_batch(dtype=torch.float32)
    call = batch.loss_inputs(Objective())
    logits = batch.logits.requires_grad_()
    before = logits.detach().clone()
    kept = expo_loss(logits, batch.completion_ids, batch.completion_mask, **call)
    kept.loss.backward()
    assert torch.equal(logits, before)
    logits_of_a_model = before.clone().requires_grad_() * 1.0
    spent = expo_loss(logits_of_a_model, batch.completion_ids, batch.completion_mask, inplace=True, **call)
    (grad,) = torch.autograd.grad(spent.loss, logits_of_a_model)
    assert torch.equal(spent.loss, kept.loss)
    assert torch.equal(grad, logits.grad)
    assert grad.data_ptr() == logits_of_a_model.data_ptr()


def test_under_no_grad_nothing_is_written():
    batch = make_batch(dtype=torch.float32)
    logits = batch.logits.requires_grad_()
    with torch.no_grad():
        out = expo_loss(
            logits, batch.completion_ids, batch.completion_mask, inplace=True, **batch.loss_inputs(Objective())
        )
    assert not out.loss.requires_grad
    assert torch.equal(logits, batch.logits)


def test_two_runs_give_equal_bits():
    batch = make_batch(8, 32, 16, 501, dtype=torch.float32)
    runs = []
    for _ in range(2):
        logits = batch.logits.requires_grad_()
        out = expo_loss(logits, batch.completion_ids, batch.completion_mask, **batch.loss_inputs(Objective()))
        out.loss.backward()
        runs.append((out.loss, logits.grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_losses_from_float32_logps_are_within_1e_6():
    batch = make_batch(64, 50, 4, 13, seed=3)
    logps = token_logps(batch.logits, batch.completion_ids).float()
    inputs = {name: tensor.float() for name, tensor in batch.loss_inputs(Objective()).items()}
    inputs["advantages"] = inputs["advantages"].abs()
    made = expo_loss_from_logps(logps, batch.completion_mask, **inputs).loss
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    truth = expo_loss_from_logps(logps.double(), batch.completion_mask, **doubles).loss
    assert abs(made - truth) <= 1e-6 * abs(truth)


def test_bfloat16_logits_get_bfloat16_gradients():
    batch = make_batch(4, 16, 8, 101, dtype=torch.float32)
    rounded = batch.logits.bfloat16()
    call = batch.loss_inputs(Objective())
    grads = []
    for logits in (rounded.requires_grad_(), rounded.detach().double().requires_grad_()):
        expo_loss(logits, batch.completion_ids, batch.completion_mask, **call).loss.backward()
        grads.append(logits.grad)
    assert grads[0].dtype == torch.bfloat16
    assert relative_error(*grads) <= 2e-3
