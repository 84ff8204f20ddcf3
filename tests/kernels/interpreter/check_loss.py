"""The kernels of the loss, run by Triton's interpreter, against the float64 reference.

Run through `test_interpreter.py`.
"""

import dataclasses

import pytest
import torch

from expo_kernels import _launch, reference
from expo_kernels._inputs import Tokens
from expo_kernels._triton import launch as kernels
from expo_kernels.objective import Objective
from tests.kernels.chunks import make_chunk
from tests.kernels.interpreter.batches import (
    CPU,
    GRAD_ERROR,
    SEQUENCE_LEVEL,
    TOKEN_LEVEL,
    assert_matches,
    assert_same_bits,
    assert_same_loss,
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


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_one_launch_gives_loss_metrics_and_gradient(name):
    objective = TOKEN_LEVEL[name]
    batch = make_batch(objective=objective)
    assert_matches(run_token_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_sequence_level_objectives_give_loss_metrics_and_gradient(name):
    objective = SEQUENCE_LEVEL[name]
    advantages = None
    if objective.ratio == "sequence_token":  # the gradient is that of "sequence" unless they differ within a sequence
        advantages = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    batch = make_batch(objective=objective, T=5, advantages=advantages)
    assert_matches(run_sequence_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("name", ["default", "dual clip", "k2", "rollout", "constant"])
def test_the_loss_from_logps_agrees_with_the_loss_from_logits(name):
    objective = TOKEN_LEVEL[name]
    batch = make_batch(objective=objective)
    assert_matches(run_sequence_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [2, 17, 1003, 4099, 4112])
def test_any_vocabulary_and_dtype(V, dtype):
    batch = make_batch(T=2, V=V, dtype=dtype)
    given = run_token_level(spoil(batch), Objective())
    assert_matches(given, expected(batch, Objective()), grad_error=GRAD_ERROR[dtype])


@pytest.mark.parametrize("T", [1, 30])
def test_one_token_and_many_rows_per_program(T):
    batch = make_batch(T=T, V=5)
    assert_matches(run_token_level(spoil(batch), Objective()), expected(batch, Objective()))


def test_sequences_longer_than_a_block():
    length = _launch.sequence_tile().block + 77
    objective = Objective(ratio="sequence")
    batch = make_batch(T=length, V=3)
    tokens, sums = tokens_of(spoil(batch), objective), kernels.make_sums(CPU)
    truth = expected(batch, objective)
    grad_logps = nan_like(truth.logps, dtype=torch.float32).view(-1)
    kernels.launch_sequence_loss(tokens, sums, truth.logps.float().view(-1), grad_logps)
    assert_same_loss(sums.metrics[0], truth)
    # a row's dL/dlogits in its chosen column is dL/dlogp * (1 - p)
    chosen = truth.grad.gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1) / (1 - truth.logps.exp())
    valid = batch.mask.view(-1)
    assert relative_error(grad_logps[valid], chosen.view(-1)[valid]) < 1e-5
    assert not grad_logps[~valid].any()


@pytest.mark.parametrize("runs", [run_token_level, run_sequence_level])
def test_all_masked_is_zero_everywhere(runs):
    batch = make_batch()
    batch.mask[:] = False
    given = runs(spoil(batch), Objective(aggregation="token"))
    assert float(given.loss) == 0.0
    assert not given.grad.any()
    assert not given.logps.any()
    assert all(float(value) == 0.0 for value in given.metrics.values())


@pytest.mark.parametrize("runs", [run_token_level, run_sequence_level])
def test_masked_contents_never_matter_and_two_runs_give_equal_bits(runs):
    batch = make_batch(T=7)
    first = runs(spoil(batch), Objective())
    assert_same_bits(first, runs(spoil(batch), Objective()))
    assert_same_bits(first, runs(spoil(batch, garbage=float("inf")), Objective()))
    assert_same_bits(first, runs(batch, Objective()))


def test_ids_out_of_range_are_skipped():
    batch = make_batch()
    batch.ids[0, 0] = 17
    given = run_token_level(batch, Objective())
    assert bool(torch.isfinite(given.grad).all())
    assert not given.grad[0, 0].any()
    assert float(given.logps[0, 0]) == 0.0


@pytest.mark.parametrize("name", ["default", "softcap", "sapo", "dppo", "gspo weighted", "gmpo", "vespo rollout"])
def test_temperatures_by_token(name):
    objective = (TOKEN_LEVEL | SEQUENCE_LEVEL)[name]
    bonus = 0.2 if name in TOKEN_LEVEL else 0.0
    batch = make_batch(objective=objective, temperatures=some_temperatures(4, 3), entropy_bonus=bonus)
    runs = run_token_level if name in TOKEN_LEVEL else run_sequence_level
    assert_matches(runs(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("runs", [run_token_level, run_sequence_level])
def test_equal_temperatures_give_the_bits_of_one_number(runs):
    objective = Objective(temperature=0.7, logit_softcap=3.0)
    batch = make_batch(V=1003, objective=objective)
    many = dataclasses.replace(batch, temperatures=torch.full((4, 3), 0.7))
    assert_same_bits(runs(many, dataclasses.replace(objective, temperature=1.0)), runs(batch, objective))


def test_without_old_logps_the_gradient_is_that_of_ratio_one():
    batch = make_batch(old=None, ref=None, beta=0.0)
    assert_matches(run_token_level(spoil(batch), Objective()), expected(batch, Objective()))


def test_advantages_by_token():
    batch = make_batch(advantages=torch.randn(4, 3, generator=torch.Generator().manual_seed(5)))
    for runs in (run_token_level, run_sequence_level):
        assert_matches(runs(spoil(batch), Objective()), expected(batch, Objective()))


@pytest.mark.parametrize("group_size", [1, 2, 3, 66])
def test_group_advantages_are_made_in_the_kernel(group_size):
    B = 2 * group_size
    rewards = torch.cat([torch.full((group_size,), 0.1), torch.rand(group_size)])
    # on-policy and without a penalty, dL/dlogp = -A / B; with two columns of logits 0, dL/dlogits is half of it
    ids, mask = torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.bool)
    tokens = Tokens(
        ids=ids,
        mask=mask,
        objective=Objective(),
        num_sequences=B,
        advantages=rewards,
        advantages_are="rewards",
        group_size=group_size,
        beta=torch.zeros(()),
        normalizer=torch.tensor(float(B)),
    )
    logits = torch.zeros(B, 2)
    grad = nan_like(logits)
    kernels.launch_row_loss(
        make_chunk(logits, grad), tokens, kernels.make_sums(CPU), torch.empty(B), return_entropy=False
    )
    advantages = reference.group_advantages(rewards.double(), group_size, "group", 1e-6)
    assert not grad[:group_size].any()
    assert torch.allclose(grad[:, 0].double() * -2 * B, advantages, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("objective", [Objective(ratio="sequence"), Objective()], ids=["sequence", "token"])
def test_launches_over_some_sequences_each_add_up_to_one_over_all(objective):
    batch = make_batch(B=8, T=5)
    tokens = tokens_of(spoil(batch), objective)
    logps = reference.token_logps(batch.logits, batch.ids, 1.0).view(-1)
    outcomes = []
    for parts in ([None], [range(3), range(3, 4), range(4, 8)]):
        sums, grad_logps = kernels.make_sums(CPU), torch.full((40,), float("nan"))
        for sequences in parts:
            kernels.launch_sequence_loss(tokens, sums, logps, grad_logps, sequences=sequences)
        outcomes.append((sums.metrics, grad_logps))
    (metrics, grad_logps), (metrics_of_parts, grad_logps_of_parts) = outcomes
    assert torch.equal(grad_logps, grad_logps_of_parts)
    assert torch.allclose(metrics, metrics_of_parts, rtol=1e-6)


def test_packed_sequences():
    batch = make_batch(B=4, T=6)
    lengths = [2, 0, 6, 3]
    kept = torch.zeros(4, 6, dtype=torch.bool)
    for sequence, length in enumerate(lengths):
        kept[sequence, :length] = True
    batch.mask &= kept
    starts = torch.tensor([0, 2, 2, 8, 11], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    for objective in (Objective(), Objective(ratio="sequence")):
        truth = expected(batch, objective)
        spoilt = spoil(batch)
        tokens = tokens_of(spoilt, objective)
        packed = dataclasses.replace(
            tokens,
            **{name: getattr(tokens, name)[kept.view(-1)] for name in ("ids", "mask", "old_logps", "ref_logps")},
            starts=starts,
            sequence_index=index,
        )
        logps, grad = torch.full((11,), float("nan")), torch.full((11, 17), float("nan"))
        chunk, sums = make_chunk(spoilt.logits[kept], grad), kernels.make_sums(CPU)
        if objective.ratio == "token":
            kernels.launch_row_loss(chunk, packed, sums, logps, return_entropy=False)
        else:
            row_max, sum_exp, grad_logps = torch.empty(11), torch.empty(11), torch.empty(11)
            kernels.launch_logps(chunk, packed, logps, row_max=row_max, sum_exp=sum_exp)
            kernels.launch_sequence_loss(packed, sums, logps, grad_logps)
            kernels.launch_grad_logits(chunk, packed, row_max=row_max, sum_exp=sum_exp, grad_logps=grad_logps)
        assert_same_loss(sums.metrics[0], truth)
        assert relative_error(grad, truth.grad[kept]) < 1e-5


def test_forward_alone_writes_no_gradient():
    batch = make_batch()
    sums, logps = kernels.make_sums(CPU), torch.empty(12)
    before = batch.logits.clone()
    chunk, tokens = make_chunk(batch.logits), tokens_of(batch, Objective())
    kernels.launch_row_loss(chunk, tokens, sums, logps, return_entropy=False)
    assert torch.equal(batch.logits, before)
    assert_same_loss(sums.metrics[0], expected(batch, Objective()))


def test_splitting_a_batch_keeps_the_gradient():
    batch = make_batch(B=8, T=3, normalizer=8)
    whole = run_token_level(spoil(batch), Objective())
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        values = {
            field.name: getattr(batch, field.name)[part]
            for field in dataclasses.fields(batch)
            if isinstance(getattr(batch, field.name), torch.Tensor)
        }
        halves.append(run_token_level(spoil(dataclasses.replace(batch, **values)), Objective()))
    assert torch.equal(torch.cat([half.grad for half in halves]), whole.grad)
    assert torch.allclose(halves[0].loss + halves[1].loss, whole.loss, rtol=1e-6)
