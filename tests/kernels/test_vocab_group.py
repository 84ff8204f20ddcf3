"""A vocabulary-parallel head on two and on four gloo processes gives the results of one process, to 1e-6.

The processes use PyTorch or, in Triton's interpreter, the kernels.
"""

import datetime
import importlib
import itertools
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from expo_kernels import Objective, _compat, _launch, linear_expo_loss, linear_token_logps
from tests.numerics import make_batch

pytestmark = pytest.mark.medium

WORLD, V = 4, 13
SIZES = {2: [4, 9], 4: [5, 1, 4, 3]}  # rows of the head on each rank
OBJECTIVES = [
    Objective(),
    Objective(ratio="sequence", temperature=0.7, logit_softcap=2.0),
    Objective(surrogate="vespo", aggregation="token"),
]


def leaves(batch, rows=slice(None)):
    return [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight[rows], batch.bias[rows])]


def run(batch, states, objective=None, *, num_rows=7, **options):
    return linear_expo_loss(
        *states[:2], batch.completion_ids, batch.completion_mask, bias=states[2], objective=objective,
        entropy_bonus=0.3, return_entropy=True, logits_budget_mb=num_rows * V * 4 / 2**20,
        **batch.loss_inputs(Objective() if objective is None else objective), **options,
    )  # fmt: skip


def assert_same_loss(batch, objective, rows, states, *, temperature=None, **options):
    whole = leaves(batch)
    truth = run(batch, whole, objective, temperature=temperature)
    shared = run(batch, states, objective, temperature=temperature, **options)
    (3.0 * truth.loss).backward()
    (3.0 * shared.loss).backward()
    torch.testing.assert_close(shared.loss, truth.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.logps, truth.logps, rtol=1e-6, atol=1e-6)
    for name, value in truth.metrics.items():
        torch.testing.assert_close(shared.metrics[name], value, rtol=1e-6, atol=1e-6)
    assert_same_gradients([state.grad for state in states], [state.grad for state in whole], rows)


def assert_same_gradients(grads, true_grads, rows):
    """Compare gradients with those of one process; this rank has all of dHidden and its rows of dWeight and dBias."""
    for grad, true_grad, part in zip(grads, true_grads, (slice(None), rows, rows), strict=True):
        local = grad.to_local() if hasattr(grad, "to_local") else grad
        assert (local - true_grad[part]).norm() <= 1e-6 * true_grad.norm()


def assert_same_logps(batch, rows, group):
    outcomes = []
    for states, vocab_group in ((leaves(batch), None), (leaves(batch, rows), group)):
        outputs = linear_token_logps(
            *states[:2], batch.completion_ids, bias=states[2], mask=batch.completion_mask, return_entropy=True,
            return_lse=True, logits_budget_mb=7 * V * 4 / 2**20, vocab_group=vocab_group,
        )  # fmt: skip
        logps, entropies, lse = outputs
        (logps.sin() + entropies.cos() + 0.1 * lse.square()).sum().backward()
        outcomes.append((torch.stack(outputs).detach(), [state.grad for state in states]))
    (outputs, grads), (shared_outputs, shared_grads) = outcomes
    torch.testing.assert_close(shared_outputs, outputs, rtol=1e-6, atol=1e-6)
    assert_same_gradients(shared_grads, grads, rows)


def assert_few_collectives_a_chunk(batch, rows, group, backend, monkeypatch):
    """PyTorch: two all-reduces; kernels: one all-gather."""
    made, all_reduce, all_gather = [], dist.all_reduce, _compat.all_gather
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(dist, "all_reduce", lambda *args, **options: (made.append(1), all_reduce(*args, **options))[1])
        patched.setattr(_compat, "all_gather", lambda *args: (made.append(1), all_gather(*args))[1])
        shared = run(batch, leaves(batch, rows), num_rows=4, vocab_group=group)
    torch.testing.assert_close(shared.loss, run(batch, leaves(batch)).loss.detach(), rtol=1e-6, atol=1e-6)
    num_tokens = int(batch.completion_mask.sum())
    num_rows = 4 * V // max(SIZES[group.size()])
    if backend == "kernels":  # whose chunks are equal parts of all positions; those behind the valid ones are skipped
        num_rows = _launch.chunk_rows(batch.completion_mask.numel(), num_rows)
    num_chunks = -(-num_tokens // num_rows)
    assert num_chunks > 1
    assert len(made) == num_chunks * {"torch": 2, "kernels": 1}[backend]


def assert_refusals(batch, rows, group, rank):
    other = make_batch(dtype=torch.float32, V=V, seed=rank)
    with pytest.raises(ValueError, match="given different tokens"):
        run(other, leaves(other, rows), vocab_group=group)
    empty = slice(0, 0) if rank == 0 else rows
    with pytest.raises(ValueError, match="give each rank at least one"):
        run(batch, leaves(batch, empty), vocab_group=group)
    with pytest.raises(TypeError, match="vocab_group is a str"):
        run(batch, leaves(batch, rows), vocab_group="tp")
    batch.completion_ids[0, 0] = V
    with pytest.raises(ValueError, match="holds 13; expected 0 <= id < 13"):
        run(batch, leaves(batch, rows), vocab_group=group)


def assert_dtensors_name_their_group(batch, rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))

    def cut(placement):
        hidden, weight, bias = leaves(batch)
        return hidden, *(distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in (weight, bias))

    rows = slice(4 * rank, min(4 * rank + 4, V))
    assert_same_loss(batch, None, rows, cut(Shard(0)))
    with pytest.raises(ValueError, match=r"call \.full_tensor\(\)"):
        run(batch, cut(Replicate()))
    with pytest.raises(ValueError, match="leave vocab_group out"):
        run(batch, cut(Shard(0)), vocab_group=mesh.get_group())


def join_ranks(rank, folder, backend, world_size=WORLD):
    torch.set_num_threads(1)
    if backend == "kernels":
        importlib.import_module("tests.kernels.interpreter.kernels_on_cpu")
        # skipped rows hold numbers that are computed but never used
        warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip


def on_one_rank(rank, folder, backend):
    join_ranks(rank, folder, backend)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    for world, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        ends = [0, *itertools.accumulate(SIZES[world])]
        rows = slice(ends[group.rank()], ends[group.rank() + 1])
        batch = make_batch(dtype=torch.float32, V=V)
        # the interpreter is slow, and test_vocab_group_kernels.py has other objectives
        for objective in OBJECTIVES if backend == "torch" or world == 2 else OBJECTIVES[:1]:
            assert_same_loss(batch, objective, rows, leaves(batch, rows), vocab_group=group)
        temperature = torch.linspace(0.5, 1.5, batch.completion_ids.numel()).view(batch.completion_ids.shape)
        assert_same_loss(batch, None, rows, leaves(batch, rows), temperature=temperature, vocab_group=group)
        assert_same_logps(batch, rows, group)
        assert_few_collectives_a_chunk(batch, rows, group, backend, pytest.MonkeyPatch())
        assert_refusals(batch, rows, group, group.rank())
    assert_dtensors_name_their_group(make_batch(dtype=torch.float32, V=V), rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "kernels"])
def test_ranks_that_share_a_head_get_what_one_process_gets(backend, tmp_path, monkeypatch):
    if backend == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the processes when they import triton
    multiprocessing.spawn(on_one_rank, args=(str(tmp_path), backend), nprocs=WORLD)


def test_without_torch_distributed_a_group_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    batch = make_batch(dtype=torch.float32, V=V)
    with pytest.raises(TypeError, match=r"torch\.distributed is not initialized"):
        run(batch, leaves(batch), vocab_group=object())
