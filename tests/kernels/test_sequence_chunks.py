"""Sequence-level objectives give the same numbers for any number of chunks, and compute logits once if possible."""

import dataclasses

import pytest
import torch

from expo_kernels import Objective, _launch, _plans, _products, _products_gpu, linear_expo_loss
from tests.numerics import make_batch, relative_error

V = 17
SEQUENCE_LEVEL = [
    (Objective(ratio="sequence"), True),
    (Objective(ratio="sequence", rollout_correction="sequence", aggregation="token"), True),
    (Objective(rollout_correction="sequence"), True),
    (Objective(rollout_correction="sequence"), False),
    (Objective(ratio="sequence", logit_softcap=2.0), False),
]


def make(*, ragged):
    """Five sequences of six positions; if ragged, one is empty and the others have 1 to 6 tokens with gaps."""
    batch = make_batch(5, 6, 8, V, dtype=torch.float32)
    batch.completion_mask[:] = True
    if ragged:
        batch.completion_mask[1] = False
        batch.completion_mask[2, 1:] = False
        batch.completion_mask[3, 1:4] = False
        batch.completion_mask[4, 5:] = False
    return batch


def pack(batch, lengths):
    """The first positions of each sequence, concatenated."""
    kept = torch.arange(batch.completion_mask.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    names = ("hidden", "completion_ids", "completion_mask", "old_logps", "ref_logps", "rollout_logps")
    packed = dataclasses.replace(batch, **{name: getattr(batch, name)[kept] for name in names})
    return packed, torch.tensor([0, *lengths]).cumsum(0).int()


def run(batch, objective, rows, *, has_old=True, **options):
    """Loss and gradients with at most that many rows of logits per chunk."""
    buffers = 2 if objective.logit_softcap and not _launch._switch.kernels_on_cpu else 1
    states = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    given = batch.loss_inputs(objective)
    if not has_old:
        given["old_logps"] = None
    out = linear_expo_loss(
        *states[:2], batch.completion_ids, batch.completion_mask, bias=states[2], objective=objective, beta=0.1,
        logits_budget_mb=rows * V * 4 * buffers / 2**20, **given, **options,
    )  # fmt: skip
    out.loss.backward()
    return out, [state.grad for state in states]


def assert_same(one, other):
    (out, grads), (true_out, true_grads) = one, other
    torch.testing.assert_close(out.loss, true_out.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logps, true_out.logps, rtol=1e-5, atol=1e-5)
    for name, value in true_out.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert relative_error(grad, true_grad) <= 1e-5


@pytest.mark.parametrize(("objective", "has_old"), SEQUENCE_LEVEL)
@pytest.mark.parametrize("rows", [1, 4, 6, 7, 12, 20])
def test_any_number_of_chunks_gives_the_numbers_of_one(objective, has_old, rows):
    batch = make(ragged=True)
    assert_same(run(batch, objective, rows, has_old=has_old), run(batch, objective, 30, has_old=has_old))


@pytest.mark.parametrize(("objective", "has_old"), SEQUENCE_LEVEL)
@pytest.mark.parametrize("rows", [1, 6, 9])
def test_packed_sequences_in_chunks_give_the_numbers_of_one(objective, has_old, rows):
    batch, cu_seqlens = pack(make(ragged=True), [6, 0, 3, 5, 6])
    several, one = (
        run(batch, objective, count, has_old=has_old, cu_seqlens=cu_seqlens, return_entropy=True)
        for count in (rows, 20)
    )
    assert_same(several, one)


def test_a_batch_all_masked_stays_zero_in_chunks():
    batch = make(ragged=False)
    batch.completion_mask[:] = False
    out, grads = run(batch, Objective(ratio="sequence"), 6)
    assert out.loss == 0
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("rows", [6, 12, 30])
def test_rewards_of_a_group_may_fall_into_several_chunks(rows):
    batch = make(ragged=True)
    objective = Objective(ratio="sequence")
    batch.advantages = None
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    outcomes = [
        run(dataclasses.replace(batch), objective, count, rewards=rewards, group_size=5) for count in (rows, 30)
    ]
    assert_same(*outcomes)


def test_log_probs_are_those_of_a_loss_by_token():
    batch = make(ragged=True)
    by_token, _ = run(batch, Objective(), 30)
    by_sequence, _ = run(batch, Objective(ratio="sequence"), 6)
    torch.testing.assert_close(by_sequence.logps, by_token.logps, rtol=0, atol=1e-6)


def count_rows(monkeypatch):
    """Count the rows of logits that are computed, in PyTorch or for the kernels."""
    made = []
    for products in (_products.WideProducts, _products_gpu.NarrowProducts, _products_gpu.SplitProducts):

        def counted(self, out, *arguments, original=products.write_logits):
            made.append(out.shape[0])
            original(self, out, *arguments)

        monkeypatch.setattr(products, "write_logits", counted)
    return made


@pytest.mark.parametrize(
    ("objective", "has_old", "rows", "passes"),
    [
        (Objective(ratio="sequence"), True, 30, 1),
        (Objective(ratio="sequence"), True, 13, 1),
        (Objective(ratio="sequence"), True, 6, 1),
        (Objective(ratio="sequence"), True, 5, 2),
        (Objective(rollout_correction="sequence"), False, 6, 1),
        (Objective(rollout_correction="sequence"), False, 5, 2),
        # the correction does not depend on the logits
        (Objective(rollout_correction="sequence"), True, 5, 1),
        (Objective(), True, 5, 1),
    ],
)
def test_logits_are_made_twice_only_where_a_sequence_exceeds_a_chunk(monkeypatch, objective, has_old, rows, passes):
    made = count_rows(monkeypatch)
    run(make(ragged=False), objective, rows, has_old=has_old)
    assert sum(made) == 30 * passes
    assert max(made) <= rows


@pytest.mark.parametrize(("rows", "passes_on_cpu"), [(6, 1), (5, 2)])
def test_packed_sequences_are_kept_whole_where_the_host_knows_them(monkeypatch, rows, passes_on_cpu):
    made = count_rows(monkeypatch)
    batch, cu_seqlens = pack(make(ragged=False), [6, 0, 4, 5, 6])
    run(batch, Objective(ratio="sequence"), rows, cu_seqlens=cu_seqlens)
    assert sum(made) == 21 * (2 if _launch._switch.kernels_on_cpu else passes_on_cpu)


@pytest.mark.parametrize(("rows", "passes"), [(6, 1), (5, 2)])
def test_packed_sequences_of_known_lengths_are_kept_whole(monkeypatch, rows, passes):
    made = count_rows(monkeypatch)
    batch, cu_seqlens = pack(make(ragged=False), [6, 0, 4, 5, 6])
    known = torch.tensor([6, 0, 4, 5, 6])
    run(batch, Objective(ratio="sequence"), rows, cu_seqlens=cu_seqlens, completion_lengths=known)
    assert sum(made) == 21 * passes


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence"), Objective(aggregation="token")])
@pytest.mark.parametrize("is_packed", [False, True])
def test_known_lengths_change_nothing_but_the_chunks(monkeypatch, objective, is_packed):
    batch, options = make(ragged=True), {}
    lengths = batch.completion_mask.sum(1)
    one = run(batch, objective, 30)
    if is_packed:
        batch, cu_seqlens = pack(batch, [6] * 5)
        options["cu_seqlens"] = cu_seqlens
    made = count_rows(monkeypatch)
    other = run(batch, objective, 7, completion_lengths=lengths, **options)
    assert_same(other, one if not is_packed else run(batch, objective, 30, **options))
    assert sum(made[:3]) == 15  # no chunk holds a masked position


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence")])
def test_known_lengths_of_zero_make_a_connected_zero(objective):
    batch = make(ragged=False)
    batch.completion_mask[:] = False
    out, grads = run(batch, objective, 7, completion_lengths=torch.zeros(5, dtype=torch.int64))
    assert out.loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert {name: float(value) for name, value in out.metrics.items()} == dict.fromkeys(out.metrics, 0.0)


def test_padding_costs_nothing_after_the_first_chunk(monkeypatch):
    batch = make(ragged=True)  # 6, 0, 1, 3 and 5 tokens
    made = count_rows(monkeypatch)
    run(batch, Objective(ratio="sequence"), 7)
    assert made == ([6, 4, 5] if _launch._switch.kernels_on_cpu else [7, 3, 5])


def test_where_lengths_stay_on_the_device_chunks_hold_padded_sequences(monkeypatch):
    # as during CUDA graph capture
    monkeypatch.setattr(_plans.HostCopy, "read", lambda self: None)
    batch, objective = make(ragged=True), Objective(ratio="sequence")
    one = run(batch, objective, 30)
    made = count_rows(monkeypatch)
    assert_same(run(batch, objective, 13), one)
    assert sum(made) == (30 if _launch._switch.kernels_on_cpu else 15)
