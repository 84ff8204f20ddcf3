"""Throughput and memory of a step: numbers worked by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from expo.config import load_config
from expo.learner.batch import MiniBatch
from expo.run.throughput import Throughput
from expo.runtime.distributed import Ranks

CONFIG = Qwen3Config(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


def timer(**seconds):
    return SimpleNamespace(seconds_of=lambda name: seconds.get(name, 0.0))


def batch(lengths, num_tokens, num_positions):
    return MiniBatch([], len(lengths), num_tokens, num_tokens, lengths, num_positions)


def test_rates_are_tokens_over_the_seconds_of_their_phase():
    measure = Throughput(load_config(None), CONFIG, Ranks(torch.device("cpu"), 0, 1))
    batches = [batch([8, 4], 9, 16), batch([10], 7, 10)]
    row = measure.row(SimpleNamespace(num_tokens=30), batches, timer(update=4.0), rollout_seconds=2.0)
    assert row["rollout_tokens_per_second"] == 15.0
    assert row["training_tokens_per_second"] == 22 / 4
    assert row["padding_fraction"] == pytest.approx(1 - 22 / 26)
    assert 0 < row["memory_peak_gib"] < 100
    assert row["mfu"] is None, "a CPU has no known peak"
    nothing = measure.row(SimpleNamespace(num_tokens=30), [batch([], 0, 0)], timer(update=4.0), 2.0)
    assert nothing["padding_fraction"] == nothing["training_tokens_per_second"] == 0.0


@pytest.mark.parametrize(("updates", "rank", "passes"), [(1, 0, 1), (4, 0, 2), (1, 8, 1)])
def test_utilisation_is_flops_over_the_peak_of_all_gpus(monkeypatch, updates, rank, passes):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = load_config(
        None, [("policy.dtype", "bfloat16"), ("policy.updates_per_step", updates), ("policy.lora_rank", rank)]
    )
    measure = Throughput(config, CONFIG, Ranks(torch.device("cuda"), 0, 2))
    # forward: (4 * 16 of attention + 3 * 24 of the MLP) products, 4 * 4 a token and context; the head for 2 of 3 tokens
    attention = 4 * 4 * (1 + 2 + 3)
    forward = 2 * 3 * (64 + 72) + attention + 2 * 2 * 40
    backward = 2 * forward if rank == 0 else forward + attention
    found = measure._utilisation([batch([3], 2, 3)], seconds=0.5)
    assert found == pytest.approx((forward * (1 + passes) + backward) / (0.5 * 989e12 * 2), rel=0.01)


def test_models_whose_flops_are_not_known_have_no_utilisation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = load_config(None, [("policy.dtype", "bfloat16")])
    measure = Throughput(config, SimpleNamespace(model_type="mamba"), Ranks(torch.device("cuda"), 0, 1))
    assert measure._utilisation([batch([3], 2, 3)], 0.5) is None
