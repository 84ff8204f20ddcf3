"""Heads that keep exponentials, with CUDA tensors that have no values: no wait, budgets of calls, rows and memory."""

import functools

import pytest
import torch

from expo_kernels import Objective, _launch
from tests.kernels.test_fake_cuda import LENGTHS, SEQUENCES, V, calls_of, hidden_states, lengths, logps_of_hidden

MIB, GPU = 2**20, torch.device("cuda")
# per row: exponentials and float32 logits of one tile, which has all columns of so small a vocabulary
FACTOR = (2 * V + 4 * V) / (4 * V)
ONE_CHUNK = {"exponentials_kernel": 1, "combine_tiles_kernel": 1, "token_loss_kernel": 1, "exponential_grads_kernel": 1}


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")


# most ATen calls of one call with its backward pass, by PyTorch 2.13; and its launches
BUDGETS = {
    "hidden": (hidden_states, 162, ONE_CHUNK),
    "hidden, 4 chunks": (
        functools.partial(hidden_states, rows=16 * FACTOR, **LENGTHS),
        420,
        {name: 4 * count for name, count in ONE_CHUNK.items()},
    ),
    "hidden, bias": (functools.partial(hidden_states, bias=True), 180, ONE_CHUNK),
    "hidden, entropy bonus": (
        functools.partial(hidden_states, entropy_bonus=0.01),
        161,
        {"exponentials_kernel": 1, "combine_tiles_kernel": 1, "token_loss_kernel": 1, "log_grads_kernel": 1},
    ),
    "hidden, by sequence, 2 chunks": (
        functools.partial(hidden_states, rows=32 * FACTOR, objective=SEQUENCES, **LENGTHS),
        250,
        {
            "exponentials_kernel": 2,
            "combine_tiles_kernel": 2,
            "sequence_loss_kernel": 2,
            "exponential_grads_kernel": 2,
        },
    ),
    "hidden, long sequences": (
        functools.partial(hidden_states, rows=8 * FACTOR, objective=SEQUENCES, **lengths(16, 0, 0, 0)),
        282,
        {
            "exponentials_kernel": 4,
            "combine_tiles_kernel": 2,
            "sequence_loss_kernel": 1,
            "exponential_grads_kernel": 2,
        },
    ),
    # the entropies have a gradient here, and the backward pass computes the logits again
    "linear_token_logps": (
        logps_of_hidden,
        162,
        {"exponentials_kernel": 2, "combine_tiles_kernel": 1, "log_grads_kernel": 1},
    ),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_call_never_waits_and_stays_within_its_budget(name):
    prepare, most_aten, launches = BUDGETS[name]
    calls = calls_of(prepare)
    assert calls.waits == []
    assert dict(calls.launches) == launches
    assert calls.num_aten <= most_aten, calls.num_aten


def test_a_softcap_with_an_entropy_bonus_takes_float32_logits():
    capped = functools.partial(hidden_states, objective=Objective(logit_softcap=30.0))
    assert "exponentials_kernel" in calls_of(capped).launches
    assert "exponentials_kernel" not in calls_of(functools.partial(capped, entropy_bonus=0.1)).launches
    assert "exponentials_kernel" not in calls_of(functools.partial(hidden_states, torch.float32)).launches


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size"),
    [(32_000, 2048), (49_152, 576), (128_256, 4096), (151_936, 896), (151_936, 4096), (262_144, 8192)],
)
def test_a_chunk_and_its_tile_of_logits_fit_the_budget(vocab_size, hidden_size):
    for budget_mb in (None, 64, 300, 2048):
        rows = _launch.most_exponential_rows(vocab_size, hidden_size, budget_mb=budget_mb, device=GPU)
        needed = rows * (2 * vocab_size + 4 * 4096 + (8 * hidden_size if budget_mb is None else 0))
        assert needed <= (budget_mb or 640) * MIB
        assert rows < 256 or rows % 256 == 0
        assert rows < 1024 or rows % 1024 == 0
        assert rows <= 2048  # whose float32 logits of a tile are 32 MiB
        options = {"itemsize": 4, "buffers": 1, "device": GPU, "hidden_size": hidden_size, "budget_mb": budget_mb}
        assert rows >= min(_launch.most_rows(vocab_size, **options), 1024)


def test_1024_rows_of_a_large_head_take_half_of_the_memory_of_float32_logits():
    assert _launch.most_exponential_rows(151_936, 4096, budget_mb=None, device=GPU) == 1024
