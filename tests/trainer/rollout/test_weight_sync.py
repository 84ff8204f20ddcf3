"""Weight syncs and their probe, with the engines that need no vLLM."""

import pytest
import torch

from expo.config import load_config
from expo.errors import Diverged, SyncError
from expo.learner.model import empty_copy
from expo.learner.policy import DeepSpeedPolicy
from expo.rollout.transformers import TransformersEngine
from expo.rollout.weight_samples import WeightSamples, describe
from expo.rollout.weight_sync import Probe, WeightSync, make_probe
from expo.runtime.distributed import join_ranks

pytestmark = pytest.mark.medium

PROMPTS = [[5, 16, 7, 18], [4, 17, 3, 18]]


@pytest.fixture(scope="module")
def policy():
    return DeepSpeedPolicy(load_config(None), join_ranks("cpu", 60))


def sync_of(policy, engine, tolerance=None, temperature=1.0):
    return WeightSync(engine, policy, join_ranks("cpu", 60), make_probe(PROMPTS, 40), temperature, tolerance)


def copying_engine(policy):
    model = empty_copy(policy.model, policy.dtype, torch.device("cpu"))
    return TransformersEngine(model, policy.tokenizer, 8, is_shared=False)


def test_an_engine_that_shares_the_policys_weights_is_not_checked(policy):
    assert sync_of(policy, TransformersEngine(policy.model, policy.tokenizer, 8)).run() is None


def test_a_copy_differs_before_a_sync_and_not_after(policy):
    sync = sync_of(policy, copying_engine(policy))
    with pytest.raises(SyncError, match=r"rollout\.sync_tolerance = 0\.0001"):
        sync.difference()
    assert sync.run() < 5e-5


def test_a_difference_below_the_probes_tolerance_is_caught(policy, monkeypatch):
    engine = copying_engine(policy)
    sync = sync_of(policy, engine)
    sync.run()
    assert sync.num_compared == sum(1 for _ in policy.named_weights())
    load, name = engine.load_weights, "model.layers.0.input_layernorm.weight"

    def load_nearly(weights):
        load(weights)
        element = dict(engine._model.named_parameters())[name].data[-1:]
        torch.nextafter(element, torch.tensor([torch.inf]), out=element)

    monkeypatch.setattr(engine, "load_weights", load_nearly)
    with pytest.raises(SyncError, match=f"does not hold the policy's {name}: .* 1 of the {sync.num_compared} weights"):
        sync.run()


def test_an_engine_without_comparable_weights_is_checked_by_the_probe_alone(policy, monkeypatch):
    engine = copying_engine(policy)
    sync = sync_of(policy, engine)
    monkeypatch.setattr(engine, "describe_weights", lambda: [{}])
    assert sync.run() < 5e-5
    assert sync.num_compared == 0


def test_weights_are_compared_in_the_engines_dtype_and_only_in_equal_shapes():
    samples = WeightSamples()
    weights = {"a": torch.tensor([1.0, 1.001]), "b": torch.ones(2, 3), "c": torch.zeros(0), "d": torch.tensor(5.0)}
    assert list(samples.record(weights.items())) == list(weights.items())
    same = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    assert samples.compare(describe(same.items())) == (4, [])
    assert samples.compare(describe([("a", torch.tensor([1.0, 1.0])), ("d", torch.tensor(5.0))])) == (2, ["a"])
    assert samples.compare(describe([("b", torch.zeros(3, 2)), ("e", torch.zeros(2))])) == (0, [])


def test_the_policy_scores_the_probe_once_a_sync(policy, monkeypatch):
    calls, logps = [], policy.logps
    monkeypatch.setattr(policy, "logps", lambda batch: calls.append(1) or logps(batch))
    copying = sync_of(policy, copying_engine(policy))
    copying.run()
    first = copying.policy_logps()
    assert torch.equal(copying.policy_logps(), first)
    assert len(calls) == 1
    sharing = sync_of(policy, TransformersEngine(policy.model, policy.tokenizer, 8))
    for _ in range(2):
        sharing.run()
        assert torch.equal(sharing.policy_logps(), first)
    assert len(calls) == 3


def test_the_tolerance_can_be_set(policy):
    sync = sync_of(policy, copying_engine(policy), tolerance=1e9)
    assert sync.difference() > 1e-4


def test_nan_log_probs_fail_the_check(policy, monkeypatch):
    engine = copying_engine(policy)
    monkeypatch.setattr(engine, "score", lambda prompts, replies, temperature: [[float("nan")] * 8] * len(prompts))
    with pytest.raises(SyncError):
        sync_of(policy, engine, tolerance=1e9).run()


def test_a_probe_is_deterministic_and_of_the_longest_length():
    probe = make_probe(PROMPTS, 40)
    assert probe == make_probe(PROMPTS, 40)
    assert {len(prompt) + len(reply) for prompt, reply in zip(probe.prompts, probe.replies, strict=True)} == {40}
    assert make_probe([[7]], 2) == Probe([[7]] * 4, [[7]] * 4)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_policy_whose_log_probs_are_not_finite_is_never_sampled_from(policy, monkeypatch, is_shared):
    engine = TransformersEngine(policy.model, policy.tokenizer, 8) if is_shared else copying_engine(policy)
    sync, logps = sync_of(policy, engine), policy.logps
    sync.run()
    monkeypatch.setattr(policy, "logps", lambda batch: logps(batch) * torch.nan)
    with pytest.raises(Diverged, match="the policy's log-probs are not finite"):
        sync.run()
