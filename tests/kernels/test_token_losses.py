"""The loss of each token, aggregation "none": its values, its gradient under any weights, what is refused."""

import math

import pytest
import torch

from expo_kernels import Objective, expo_loss, expo_loss_from_logps, linear_expo_loss, linear_token_logps
from tests.numerics import make_batch, relative_error

OBJECTIVES = {
    "clip": {},
    "gspo": {"ratio": "sequence", "clip_low": 0.05},
    "gspo-token": {"ratio": "sequence_token", "kl_importance_weighted": True},
    "gmpo": {"surrogate": "gmpo", "kl": "k1"},
    "vespo": {"surrogate": "vespo"},
    "icepop": {"rollout_correction": "token_mask", "rollout_cap": 1.4},
    "geometric mask": {"rollout_correction": "geometric_mask", "rollout_floor": 0.9, "rollout_cap": 1.1},
}


def of_each_token(logps, mask, **options):
    settings = options.pop("settings", {})
    return expo_loss_from_logps(logps, mask, objective=Objective(aggregation="none", **settings), **options)


def test_losses_by_hand_are_zero_where_masked():
    # ratios 1.5 (clipped to 1.2) and 0.5; k1 of 0.25 nats at the first, beta 0.4
    logps = torch.tensor([[math.log(1.5), math.log(0.5), 9.0]])
    out = of_each_token(
        logps, torch.tensor([[1, 1, 0]]), advantages=torch.tensor([2.0]), old_logps=torch.zeros(1, 3),
        ref_logps=logps - torch.tensor([[0.25, 0.0, float("nan")]]), beta=0.4, settings={"kl": "k1"},
    )  # fmt: skip
    assert out.loss[0].tolist() == pytest.approx([-2.4 + 0.1, -1.0, 0.0])
    assert out.metrics["ratio_mean"].item() == pytest.approx(1.0)
    assert out.metrics["clip_high_fraction"].item() == 0.5
    assert out.metrics["tokens"].item() == 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_of_the_losses_has_the_gradient_of_the_mean_loss(name):
    batch = make_batch(dtype=torch.float32)
    settings = OBJECTIVES[name]
    per_token = batch.advantages[:, None] * torch.linspace(0.0, 2.0, 6)
    given = batch.loss_inputs(Objective(**settings)) | {"beta": 0.1, "advantages": per_token}
    mask, grads = batch.completion_mask, []
    logps = (batch.old_logps + 0.2 * batch.ref_logps.sin()).requires_grad_()
    losses = of_each_token(logps, mask, settings=settings, **given).loss
    assert losses.shape == mask.shape
    assert not losses[~mask].any()
    mean = expo_loss_from_logps(logps, mask, objective=Objective(aggregation="token", **settings), **given).loss
    torch.testing.assert_close(losses.sum() / mask.sum(), mean, rtol=1e-5, atol=1e-6)
    for loss in (losses.sum() / mask.sum(), mean):
        grads.append(torch.autograd.grad(loss, logps)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_packed_losses_are_those_of_the_padded_call():
    batch = make_batch(dtype=torch.float32)
    given = batch.loss_inputs(Objective()) | {"beta": 0.1, "settings": {"ratio": "sequence"}}
    logps = batch.old_logps + 0.3
    padded = of_each_token(logps, batch.completion_mask, **given).loss
    flat = {name: value.flatten() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    starts = 6 * torch.arange(5, dtype=torch.int32)
    packed = of_each_token(logps.flatten(), batch.completion_mask.flatten(), cu_seqlens=starts, **flat).loss
    torch.testing.assert_close(packed, padded.flatten(), rtol=1e-6, atol=1e-7)


def test_a_loss_of_your_own_from_hidden_states_has_the_gradient_of_the_fused_one():
    batch = make_batch(dtype=torch.float32)
    given, mask = batch.loss_inputs(Objective()) | {"beta": 0.1}, batch.completion_mask
    grads = []
    for is_fused in (True, False):
        states = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        if is_fused:
            loss = linear_expo_loss(*states, batch.completion_ids, mask, **given).loss
        else:
            logps = linear_token_logps(*states, batch.completion_ids, mask=mask)
            loss = (of_each_token(logps, mask, **given).loss.sum(1) / mask.sum(1)).mean()
        grads.append(torch.autograd.grad(loss, states))
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_masked_positions_and_their_incoming_gradients_never_matter():
    batch = make_batch(dtype=torch.float32)
    mask = batch.completion_mask
    weights, grads = torch.randn(mask.shape), []
    for garbage in (0.0, float("nan")):
        logps = (batch.old_logps + 0.1).masked_fill(~mask, garbage).requires_grad_()
        losses = of_each_token(logps, mask, advantages=batch.advantages, old_logps=batch.old_logps, beta=0.0).loss
        (grad,) = torch.autograd.grad(losses, logps, weights.masked_fill(~mask, garbage))
        grads += [losses.detach(), grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])
    assert not grads[3][~mask].any()


def test_log_probs_of_16_bits_get_float32_losses_and_gradients_of_their_own_dtype():
    batch = make_batch(dtype=torch.float32)
    logps = batch.old_logps.bfloat16().requires_grad_()
    losses = of_each_token(logps, batch.completion_mask, advantages=batch.advantages, beta=0.0).loss
    assert losses.dtype == torch.float32
    assert torch.autograd.grad(losses.sum(), logps)[0].dtype == torch.bfloat16


def test_a_normalizer_of_losses_that_are_not_averaged_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match='normalizer has no effect with aggregation "none"'):
        of_each_token(batch.old_logps, batch.completion_mask, advantages=batch.advantages, beta=0.0, normalizer=3.0)


def test_losses_from_logits_and_hidden_states_are_refused():
    batch, refusal = make_batch(), 'aggregation="none" does not go with logits or hidden states'
    given = {"advantages": batch.advantages, "beta": 0.0, "objective": Objective(aggregation="none")}
    positions = batch.completion_ids, batch.completion_mask
    with pytest.raises(ValueError, match=refusal):
        expo_loss(batch.logits, *positions, **given)
    with pytest.raises(ValueError, match=refusal):
        linear_expo_loss(batch.hidden, batch.weight, *positions, **given)
