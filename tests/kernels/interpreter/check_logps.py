"""Log-probs, entropies and their gradients, and numbers far from 0, run by Triton's interpreter.

Run through `test_interpreter.py`.
"""

import dataclasses
import math

import pytest
import torch

from expo_kernels import reference
from expo_kernels._triton import launch as kernels
from expo_kernels.objective import Objective
from tests.kernels.chunks import make_chunk
from tests.kernels.interpreter.batches import (
    GRAD_ERROR,
    assert_matches,
    expected,
    make_batch,
    nan_like,
    relative_error,
    run_sequence_level,
    run_token_level,
    some_temperatures,
    spoil,
    tokens_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning"
)  # skipped rows hold numbers that are never used


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("has_lse", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logps_entropies_and_log_sum_exps_have_their_gradients(dtype, softcap, has_lse, by_token):
    objective = Objective(temperature=0.7, logit_softcap=softcap)
    changes = {"temperatures": some_temperatures(4, 3).flip(0)} if by_token else {}
    batch = make_batch(V=1003, dtype=dtype, objective=objective, **changes)
    temperature = batch.temperature_of(objective)
    batch.logits[0, 0, 5:9] = float("-inf")
    spoilt = spoil(batch)
    B, T, V = batch.shape
    generator = torch.Generator().manual_seed(1)
    grad_logps, grad_entropies, grad_lse = (torch.randn(B, T, generator=generator) for _ in range(3))
    grad_lse *= has_lse
    grad = nan_like(batch.logits)
    tokens, chunk = tokens_of(spoilt, objective), make_chunk(spoilt.logits, grad)
    logps, entropies, row_max, sum_exp = (nan_like(batch.mask, dtype=torch.float32).view(-1) for _ in range(4))
    kernels.launch_logps(chunk, tokens, logps, entropies=entropies, row_max=row_max, sum_exp=sum_exp)
    kernels.launch_grad_logits(
        chunk,
        tokens,
        row_max=row_max,
        sum_exp=sum_exp,
        grad_logps=grad_logps.view(-1),
        entropies=entropies,
        grad_entropies=grad_entropies.view(-1),
        grad_lse=grad_lse.view(-1) if has_lse else None,
    )
    logits = torch.where(batch.mask.unsqueeze(-1), batch.logits, 0).double()
    scaled = reference.scaled_logits(logits, temperature, softcap)
    probs = torch.softmax(scaled, -1)
    entropy = torch.special.entr(probs).sum(-1)
    onehot = torch.nn.functional.one_hot(torch.where(batch.mask, batch.ids, 0), V)
    # written by hand, because autograd has no finite gradient of p log p at columns of probability 0
    grads = grad_logps[..., None] * (onehot - probs) + grad_entropies[..., None] * (
        torch.special.entr(probs) - probs * entropy[..., None]
    )
    grads += grad_lse[..., None] * probs
    cap_grad = 1.0 if softcap is None else 1 - torch.tanh(logits / softcap) ** 2
    divisor = temperature[..., None] if by_token else temperature
    truth = torch.where(batch.mask[..., None], grads * cap_grad / divisor, 0)
    truth_logps = reference.token_logps(logits, torch.where(batch.mask, batch.ids, 0), temperature, softcap)
    assert float((logps.view(B, T) - truth_logps)[batch.mask].abs().max()) < 5e-6
    assert float((entropies.view(B, T) - entropy)[batch.mask].abs().max()) < 5e-6
    assert not logps.view(B, T)[~batch.mask].any()
    assert not entropies.view(B, T)[~batch.mask].any()
    assert relative_error(grad, truth) <= GRAD_ERROR[dtype]


def test_on_policy_ratios_are_exactly_one_and_equal_policies_have_no_kl():
    batch = make_batch(V=1003, spread=6.0)
    tokens, logps = tokens_of(batch, Objective()), nan_like(batch.mask, dtype=torch.float32).view(-1)
    kernels.launch_logps(make_chunk(batch.logits), tokens, logps)
    for old in (None, logps.view(batch.mask.shape)):
        given = run_token_level(dataclasses.replace(batch, old=old, ref=logps.view(batch.mask.shape)), Objective())
        assert torch.equal(given.logps.view(-1), logps)
        assert float(given.metrics["ratio_mean"]) == 1.0
        assert float(given.metrics["ratio_max"]) == 1.0
        assert float(given.metrics["kl"]) == 0.0


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_logits_of_ten_thousand_stay_exact(shift):
    batch = make_batch(V=257)
    # whole numbers: float32 holds them and their differences exactly
    batch.logits = (batch.logits * 4).round() + shift
    batch.logits[0, 1, 7] = -shift
    assert_matches(run_token_level(batch, Objective(clip_high=1e6)), expected(batch, Objective(clip_high=1e6)))


def test_log_probs_thousands_of_nats_apart_stay_finite():
    batch = make_batch()
    batch.old[:] = -5000.0
    batch.ref[:] = -9000.0
    batch.ref[0] = 3000.0
    for runs in (run_token_level, run_sequence_level):
        given = runs(batch, Objective(kl_importance_weighted=True))
        assert bool(torch.isfinite(given.grad).all())
        assert math.isfinite(float(given.loss))


def test_a_nan_in_a_valid_row_gives_nan():
    batch = make_batch()
    batch.logits[0, 0, 3] = float("nan")
    given = run_token_level(batch, Objective())
    assert math.isnan(float(given.loss))
    assert math.isnan(float(given.logps[0, 0]))
