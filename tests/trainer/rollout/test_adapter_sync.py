"""Weight syncs that send LoRA adapters alone, without vLLM."""

import itertools

import pytest
import torch

import expo.rollout.build
import expo.run.inputs
import expo.run.lifecycle
from expo.config import load_config
from expo.errors import ConfigError, SyncError
from expo.learner.lora import adapted_layers, linear_layers
from expo.learner.model import architecture
from expo.learner.policy import DeepSpeedPolicy
from expo.rollout.vllm.common import lora_settings, max_lora_rank
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.run.ahead import RolloutQueue
from expo.runtime.distributed import join_ranks
from expo.train import train
from tests.trainer.rollout.adapter_engine import AdapterEngine, move
from tests.trainer.rollout.staging_engine import skip_second_use
from tests.trainer.run.short_runs import quick, records_of, weights_of

pytestmark = pytest.mark.medium

LORA = {"policy.lora_rank": 4, "policy.lora_alpha": 12}


def new_policy(**values):
    return DeepSpeedPolicy(load_config(None, list({**LORA, **values}.items())), join_ranks("cpu", 60))


@pytest.fixture(scope="module")
def policy():
    return new_policy()


@pytest.fixture
def pair(policy):
    engine = AdapterEngine(policy)
    sync = WeightSync(
        engine, policy, join_ranks("cpu", 60), make_probe([[5, 16, 7, 18], [4, 17, 3, 18]], 40), 1.0, None
    )
    sync.run()
    return engine, sync


def test_adapters_alone_bring_every_large_update(policy, pair):
    engine, sync = pair
    for seed in range(3):
        move(policy, seed)
        with pytest.raises(SyncError, match="sync_tolerance"):
            sync.difference()
        assert sync.run() < 5e-5
    assert len(engine.base) == 1, "the base weights are sent once"
    assert set(engine.adapters) == {
        f"{layer}.lora_{part}.weight" for layer in adapted_layers(policy.model) for part in "AB"
    }


def test_a_stale_adapter_is_caught(policy, pair, monkeypatch):
    engine, sync = pair
    monkeypatch.setattr(engine, "load_weights", list)
    move(policy, 5)
    with pytest.raises(SyncError, match="nats on the probe"):
        sync.run()


def test_an_adapter_that_differs_by_less_than_the_probe_finds_is_caught(policy, pair):
    engine, sync = pair
    assert sync.num_compared == len(engine.base[0]) + len(engine.adapters)
    name = "model.layers.0.mlp.down_proj.lora_B.weight"
    real = engine.load_weights

    def load_nearly(weights):
        real(weights)
        element = engine.adapters[name][-1, -1:]
        torch.nextafter(element, torch.tensor([torch.inf]), out=element)

    engine.load_weights = load_nearly
    with pytest.raises(SyncError, match=f"does not hold the policy's {name}: .* 1 of the {sync.num_compared} weights"):
        sync.run()


def test_base_weights_that_change_are_caught(policy, pair):
    engine, sync = pair
    engine.base[0]["model.norm.weight"][0] += 1e-6
    with pytest.raises(SyncError, match=r"does not hold the policy's model\.norm\.weight"):
        sync.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_and_adapters_have_the_sum_of_the_merged_weights(dtype):
    policy = new_policy(**{"policy.dtype": dtype})
    move(policy, 7)
    policy.dtype = torch.float32  # so that none of the three is rounded
    merged, base, adapters = (
        dict(weights) for weights in (policy.named_weights(), policy.named_base_weights(), policy.named_adapters())
    )
    assert list(base) == [name for name, _ in architecture(load_config(None).model).named_parameters()]
    assert set(base) == set(merged)
    for layer in adapted_layers(policy.model):
        down, up = (adapters.pop(f"{layer}.lora_{part}.weight") for part in "AB")
        assert down.shape[0] == up.shape[1] == 4
        torch.testing.assert_close(base[f"{layer}.weight"] + up @ down, merged[f"{layer}.weight"])
    assert adapters == {}
    policy.dtype = getattr(torch, dtype)
    assert {value.dtype for _, value in policy.named_adapters()} == {policy.dtype}


def test_the_layers_that_the_server_adapts_are_the_policys(policy):
    layers = linear_layers(architecture(load_config(None).model))
    assert layers == adapted_layers(policy.model)
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_settings(4, layers)["lora_target_modules"] == modules


def test_vllm_allocates_the_smallest_rank_that_holds_the_adapter():
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 64, 257, 512)] == [1, 8, 8, 16, 64, 320, 512]


ADAPTER = {"rollout.engine": "vllm", "vllm.lora": "adapter", **LORA}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout.engine": "transformers"}, r"is for rollout\.engine = vllm or vllm-server, not transformers; remove"),
        ({"policy.lora_rank": 0}, r"policy\.lora_rank = 0 trains all weights; .*take vllm\.lora = merged"),
        ({"policy.lora_rank": 513}, r"policy\.lora_rank <= 512, .* not 513; lower it, or take vllm\.lora = merged"),
        ({"vllm.sleep": True}, r"vllm\.sleep discards the weights.* turn it off, or take vllm\.lora = merged"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    assert load_config(None, list(ADAPTER.items())).vllm.lora == "adapter"
    with pytest.raises(ConfigError, match=message):
        load_config(None, list({**ADAPTER, **settings}.items()))


# --- runs that sample ahead

AHEAD = {
    "rollout__engine": "vllm-server", "rollout__ahead": 1, "objective__rollout_correction": "token",
    "vllm__lora": "adapter", "policy__lora_rank": 4, "optimizer__lr": 1e-3, "run__checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture
def engines(monkeypatch):
    """The engines that runs have built."""
    built = []

    def build(config, policy, *_):
        built.append(AdapterEngine(policy, config.rollout.batch_size))
        return built[-1]

    monkeypatch.setattr(expo.rollout.build, "_build_rank_engine", build)
    monkeypatch.setattr(expo.run.inputs, "check_engine", lambda _: None)  # that vLLM is installed
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    return built


class Killed(BaseException):
    """Ends a run at a moment at which it saves nothing."""


def test_a_resumed_run_that_samples_ahead_sends_base_weights_and_adapters_again(engines, tmp_path, monkeypatch):
    whole = train(quick(tmp_path, "whole", **AHEAD))
    real, calls = RolloutQueue.update_weights, itertools.count(1)

    def update_or_die(*arguments):
        if next(calls) == 4:
            raise Killed
        real(*arguments)

    config = quick(tmp_path, **AHEAD)
    with monkeypatch.context() as patch:
        patch.setattr(RolloutQueue, "update_weights", update_or_die)
        with pytest.raises(Killed):
            train(config)
    resumed = train(config, resume=True)
    assert [len(engine.base) for engine in engines] == [1, 1, 1]
    assert weights_of(resumed) == weights_of(whole)
    assert records_of(resumed) == records_of(whole)
    for row in records_of(whole)["metrics"]:
        assert row["sync_max_abs_dlogp"] < 5e-5
        assert row["sync_weights_compared"] == len(engines[0].base[0]) + len(engines[0].adapters)


def test_a_stale_adapter_is_caught_before_its_replies_are_trained_on(engines, tmp_path, monkeypatch):
    skip_second_use(monkeypatch, AdapterEngine)
    with pytest.raises(SyncError, match=r"rollout engine (and the policy differ|does not hold)"):
        train(quick(tmp_path, **{**AHEAD, "evaluation__every": 0}))
