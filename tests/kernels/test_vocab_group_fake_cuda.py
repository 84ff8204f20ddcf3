"""A head sharded over the vocabulary on CUDA tensors, without a GPU: after the first call the host never waits."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from expo_kernels import LossOutput, _compat, _vocab_group
from tests.kernels.fake_cuda import backward, fake_cuda
from tests.kernels.test_fake_cuda import LENGTHS, SEQUENCES, V, hidden_states, logps_of_hidden

READ, COMBINE, LOSS, GRAD = "read_shard_kernel", "combine_shards_kernel", "token_loss_kernel", "row_grad_logits_kernel"


@pytest.fixture
def shared(monkeypatch):
    """A group of one rank, which is told that a second one has as many columns; collectives are recorded, not run."""
    made = []

    def exchange_sizes(_, __, valid_ids, most_rows):
        assert valid_ids is None
        made.append("sizes")
        return _vocab_group._Exchanged([V, V], most_rows)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(_vocab_group, "_exchange", exchange_sizes)
    monkeypatch.setattr(_compat, "all_gather", lambda *_: made.append("all_gather"))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: made.append("all_reduce"))
    yield SimpleNamespace(options={"vocab_group": dist.group.WORLD}, collectives=made)
    dist.destroy_process_group()


def second_call(prepare, shared):
    """What the second of two calls does, with its backward pass."""
    with fake_cuda() as device:
        run = prepare(**shared.options)
        run()
        shared.collectives.clear()
        with device.strict() as calls:
            made = run()
            made = made.loss if isinstance(made, LossOutput) else made[0] + made[1]
            backward(made, None if made.dim() == 0 else torch.ones_like(made))
    assert calls.waits == []
    return calls


def test_one_all_gather_per_chunk_and_one_sum_of_the_hidden_gradient(shared):
    calls = second_call(functools.partial(hidden_states, rows=16, bias=True, entropy_bonus=0.1, **LENGTHS), shared)
    assert calls.launches == {READ: 4, COMBINE: 4, LOSS: 4, GRAD: 4}
    assert shared.collectives == ["all_gather"] * 4 + ["all_reduce"]


def test_a_sequence_objective_takes_one_pass(shared):
    calls = second_call(functools.partial(hidden_states, rows=32, objective=SEQUENCES, **LENGTHS), shared)
    assert calls.launches == {READ: 2, COMBINE: 2, "sequence_loss_kernel": 2, GRAD: 2}
    assert shared.collectives == ["all_gather"] * 2 + ["all_reduce"]


def test_the_backward_of_log_probs_exchanges_only_the_hidden_gradient(shared):
    calls = second_call(functools.partial(logps_of_hidden, rows=16, **LENGTHS), shared)
    assert calls.launches == {READ: 4, COMBINE: 4, GRAD: 4}
    assert shared.collectives == ["all_gather"] * 4 + ["all_reduce"]


def test_a_sharded_head_takes_float32_logits_if_exponentials_are_switched_on(shared, monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")
    calls = second_call(functools.partial(hidden_states, rows=16, **LENGTHS), shared)
    assert calls.launches == {READ: 4, COMBINE: 4, LOSS: 4, GRAD: 4}


def test_another_shape_exchanges_the_sizes_again(shared):
    second_call(hidden_states, shared)
    assert "sizes" not in shared.collectives
    with fake_cuda():
        hidden_states(torch.float32, **shared.options)()
    assert shared.collectives.count("sizes") == 1
