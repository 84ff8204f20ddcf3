"""The kernels on three ranks that share a head, in Triton's interpreter, against float64 on one process.

One rank holds no chosen id, and one has so few columns that its gradients of the logits are not bfloat16.
"""

import importlib
import itertools

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from expo_kernels import Objective, _vocab_group, linear_expo_loss, linear_token_logps
from expo_kernels import _validate as validate
from tests.kernels.test_vocab_group import join_ranks
from tests.numerics import make_batch, relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.medium

# rows of the head on each rank; with multiples of 16, rows of logits have no padding that would hide a wrong column
SIZES = [304, 144, 6]
ENDS = [0, *itertools.accumulate(SIZES)]
V, B, T = sum(SIZES), 4, 6
FEW_ROWS = 8 * max(SIZES) * 4 / 2**20  # MiB: chunks of 8 of the 24 rows
GRAD_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
BIAS_SLACK = 1.25  # a few large numbers dominate the rounding error of dBias
CASES = {
    "clip, rewards": {"objective": Objective(temperature=0.7), "by_rewards": True},
    "cispo, softcap, entropy bonus": {
        "objective": Objective(surrogate="cispo", kl="k2", logit_softcap=3.0, aggregation="token"),
        "entropy_bonus": 0.3,
    },
    "advantages of tokens, rollout correction": {
        "objective": Objective(rollout_correction="token", aggregation="constant", max_completion_length=T),
        "by_tokens": True,
    },
    "temperatures of tokens, softcap, entropy bonus": {
        "objective": Objective(surrogate="sapo", logit_softcap=5.0),
        "temperature": torch.linspace(0.6, 1.4, B * T).view(B, T),
        "entropy_bonus": 0.2,
    },
    "packed": {"objective": Objective(clip_high=0.28), "is_packed": True},
    "sequence ratio, entropy bonus": {
        "objective": Objective(ratio="sequence", temperature=1.3, logit_softcap=4.0),
        "entropy_bonus": 0.1,
    },
    "sequence ratio, packed": {"objective": Objective(ratio="sequence"), "is_packed": True},  # a pass for log-probs
}


def batch_of(dtype, seed=0):
    """Ids on the first and the last rank only; masked positions hold NaN and ids that do not exist."""
    batch = make_batch(B, T, H=64, V=V, dtype=dtype, seed=seed)
    held = torch.cat([torch.arange(ENDS[1]), torch.arange(ENDS[2], ENDS[3])])
    # the last rank has few columns: every third id is one of them
    batch.completion_ids = held[batch.completion_ids % len(held)]
    batch.completion_ids[:, ::3] = ENDS[2] + batch.completion_ids[:, ::3] % SIZES[2]
    logps = torch.log_softmax(batch.logits.double(), -1).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    generator = torch.Generator().manual_seed(seed)
    batch.old_logps, batch.ref_logps, batch.rollout_logps = (
        (logps + 0.3 * torch.randn(B, T, generator=generator)).float() for _ in range(3)
    )
    hidden = ~batch.completion_mask
    batch.hidden[hidden] = float("nan")
    batch.completion_ids[hidden] = torch.where(torch.arange(int(hidden.sum())) % 2 == 0, -100, V + 5)
    batch.old_logps[hidden] = float("nan")
    return batch


def run(batch, dtype, rows, case, **options):
    """Loss, metrics, log-probs and gradients, for inputs cast to `dtype`."""
    case = dict(case)
    leaves = [tensor.to(dtype, copy=True) for tensor in (batch.hidden, batch.weight[rows], batch.bias[rows])]
    given = batch.loss_inputs(case["objective"])
    mask, ids = batch.completion_mask, batch.completion_ids
    if case.pop("by_rewards", False):
        given["advantages"] = None
        given |= {"rewards": (batch.advantages > 0).float(), "group_size": 2}
    if case.pop("by_tokens", False):
        given["advantages"] = torch.linspace(-1.0, 1.0, B * T).view(B, T)
    if case.pop("is_packed", False):
        leaves[0], ids, mask = leaves[0].flatten(0, 1), ids.flatten(), mask.flatten()
        given = {name: tensor if name == "advantages" else tensor.flatten() for name, tensor in given.items()}
        given["cu_seqlens"] = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    if dtype == torch.float64:
        given = {name: tensor.double() if name.endswith("logps") else tensor for name, tensor in given.items()}
    for leaf in leaves:
        leaf.requires_grad_()
    output = linear_expo_loss(
        *leaves[:2], ids, mask, bias=leaves[2], beta=0.1, return_entropy=True, logits_budget_mb=FEW_ROWS,
        **given, **case, **options,
    )  # fmt: skip
    (3.0 * output.loss).backward()
    return output, [leaf.grad for leaf in leaves]


def assert_close_gradients(grads, true_grads, dtype, rows, group):
    """The error of dWeight and dBias is that of the whole head: the chosen columns, which have most of the norm, are
    not on every rank."""
    assert relative_error(grads[0], true_grads[0]) <= GRAD_ERROR[dtype]
    for grad, true_grad, slack in zip(grads[1:], true_grads[1:], (1.0, BIAS_SLACK), strict=True):
        squares = (grad.double() - true_grad[rows]).square().sum().view(1)
        dist.all_reduce(squares, group=group)
        assert squares.sqrt() <= slack * GRAD_ERROR[dtype] * true_grad.norm()


def assert_close_to_float64(batch, dtype, rows, case, group):
    output, grads = run(batch, dtype, rows, case, vocab_group=group)
    truth, true_grads = run(batch, torch.float64, slice(None), case)
    torch.testing.assert_close(output.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    assert (output.logps - truth.logps).abs().max() <= 2e-5
    for name, value in truth.metrics.items():
        torch.testing.assert_close(output.metrics[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    assert_close_gradients(grads, true_grads, dtype, rows, group)
    assert not grads[0].view(B, T, -1)[~batch.completion_mask].any()
    return output


def assert_every_rank_has_the_bits_of(output, group):
    mine = torch.cat(
        [output.loss.detach().view(1), output.logps.flatten(), *(v.view(1) for v in output.metrics.values())]
    )
    everyones = [torch.empty_like(mine) for _ in SIZES]
    dist.all_gather(everyones, mine, group=group)
    assert all(torch.equal(mine, other) for other in everyones)


def assert_logps_close_to_float64(batch, dtype, rows, group):
    outcomes = []
    for wide, part, vocab_group in ((torch.float64, slice(None), None), (dtype, rows, group)):
        hidden, weight, bias = (
            t.to(wide, copy=True).requires_grad_() for t in (batch.hidden, batch.weight[part], batch.bias[part])
        )
        logps, entropies = linear_token_logps(
            hidden, weight, batch.completion_ids, bias=bias, mask=batch.completion_mask, return_entropy=True,
            temperature=0.8, logits_budget_mb=FEW_ROWS, vocab_group=vocab_group,
        )  # fmt: skip
        (logps.sin() + entropies.cos()).sum().backward()
        outcomes.append((logps, entropies, [hidden.grad, weight.grad, bias.grad]))
    (true_logps, true_entropies, true_grads), (logps, entropies, grads) = outcomes
    assert (logps - true_logps).abs().max() <= 2e-5
    assert (entropies - true_entropies).abs().max() <= 2e-5
    assert_close_gradients(grads, true_grads, dtype, rows, group)


def assert_equal_policies_have_ratio_one(batch, rows, group):
    """Whatever the chunks in which the old log-probs were computed."""
    weight, bias = batch.weight[rows], batch.bias[rows]
    given = batch.completion_ids, batch.completion_mask
    old = linear_token_logps(batch.hidden, weight, given[0], bias=bias, mask=given[1], vocab_group=group)
    output = linear_expo_loss(
        batch.hidden, weight, *given, bias=bias, advantages=batch.advantages, old_logps=old, ref_logps=old, beta=0.1,
        logits_budget_mb=FEW_ROWS, vocab_group=group,
    )  # fmt: skip
    assert output.metrics["ratio_mean"] == output.metrics["ratio_max"] == 1
    assert output.metrics["kl"] == 0


def assert_a_masked_batch_gives_zero(batch, rows, group):
    batch.completion_mask[:] = False
    batch.hidden[:] = float("nan")
    output, grads = run(batch, torch.bfloat16, rows, CASES["clip, rewards"], vocab_group=group)
    assert output.loss == 0
    assert output.metrics["tokens"] == 0
    assert not output.logps.any()
    assert not any(grad.any() for grad in grads)


def assert_one_rank_has_the_bits_of_a_whole_head(batch, alone):
    for case in ("cispo, softcap, entropy bonus", "sequence ratio, packed"):
        outcomes = [run(batch, torch.bfloat16, slice(None), CASES[case], vocab_group=group) for group in (None, alone)]
        (whole, whole_grads), (shard, shard_grads) = outcomes
        assert torch.equal(whole.loss, shard.loss)
        assert torch.equal(whole.logps, shard.logps)
        assert whole.metrics == shard.metrics
        assert all(torch.equal(one, other) for one, other in zip(whole_grads, shard_grads, strict=True))


def assert_sizes_are_exchanged_once(batch, rows, group, monkeypatch):
    """Where values may not be read, as on a GPU: later calls read nothing on the host, and exchange no sizes."""
    _vocab_group._EXCHANGED.clear()
    exchanges, exchange = [], _vocab_group._exchange
    monkeypatch.setattr(_vocab_group, "_exchange", lambda *args: (exchanges.append(1), exchange(*args))[1])
    monkeypatch.setattr(validate, "may_read", lambda _: False)
    case = CASES["clip, rewards"]
    expected, _ = run(batch, torch.float32, rows, case, vocab_group=group)
    assert len(exchanges) == 1
    wide = {"vocab_group": group, "logits_budget_mb": None}

    def refuse(*_):
        raise AssertionError("a value was read on the host")

    def one_chunk():
        leaves = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight[rows])]
        loss = linear_expo_loss(
            *leaves, batch.completion_ids, batch.completion_mask, advantages=batch.advantages, beta=0.0, **wide
        ).loss
        logps = linear_token_logps(*leaves, batch.completion_ids, mask=batch.completion_mask, **wide)
        (logps.sum() + loss).backward()

    one_chunk()
    assert len(exchanges) == 2
    with monkeypatch.context() as patched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
            patched.setattr(torch.Tensor, name, refuse)
        one_chunk()
    found, _ = run(batch, torch.float32, rows, case, vocab_group=group)
    assert len(exchanges) == 2
    assert torch.equal(found.loss, expected.loss)
    monkeypatch.undo()


def on_one_rank(rank, folder):
    join_ranks(rank, folder, "kernels", len(SIZES))
    launch = importlib.import_module("expo_kernels._launch")
    assert launch.use_kernels(torch.zeros(1))
    group, rows = dist.group.WORLD, slice(ENDS[rank], ENDS[rank + 1])
    for number, case in enumerate(CASES.values()):
        dtype = (torch.bfloat16, torch.float32)[number % 2]
        batch = batch_of(dtype, seed=number)
        assert_every_rank_has_the_bits_of(assert_close_to_float64(batch, dtype, rows, case, group), group)
    for dtype in GRAD_ERROR:
        assert_logps_close_to_float64(batch_of(dtype), dtype, rows, group)
    assert_close_to_float64(batch_of(torch.float16), torch.float16, rows, CASES["clip, rewards"], group)
    assert_equal_policies_have_ratio_one(batch_of(torch.float32), rows, group)
    assert_sizes_are_exchanged_once(batch_of(torch.float32), rows, group, pytest.MonkeyPatch())
    assert_a_masked_batch_gives_zero(batch_of(torch.bfloat16), rows, group)
    alone = [dist.new_group([other]) for other in range(len(SIZES))][rank]
    assert_one_rank_has_the_bits_of_a_whole_head(batch_of(torch.bfloat16), alone)
    dist.destroy_process_group()


def test_kernels_on_ranks_that_share_a_head_are_close_to_float64(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the processes when they import triton
    multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=len(SIZES))
