"""The policy on one rank: log-probs, gradients, optimizer steps, and checkpoints that restore every bit.

Many ranks: ranks/test_same_step.py.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expo.config import load_config
from expo.learner.policy import DeepSpeedPolicy
from expo.runtime.distributed import join_ranks
from expo.types import Sample

pytestmark = pytest.mark.medium

BETA = torch.tensor(0.0131)
TEXTS = [("3+8-2+7=", "11,9,\\boxed{16}"), ("1+1=", "\\boxed{2}"), ("4+5-9=", "9,\\boxed{1}")]


def make(**overrides):
    pairs = [(name.replace("__", "."), value) for name, value in overrides.items()]
    return DeepSpeedPolicy(load_config(None, pairs), join_ranks("cpu", 60))


def samples(policy, count=12):
    found = []
    for n in range(count):
        prompt, reply = (policy.tokenizer(text)["input_ids"] for text in TEXTS[n % 3])
        reply = [*reply, policy.tokenizer.eos_token_id]
        found.append(Sample(prompt, reply, [-0.5] * len(reply), advantage=(-1.0) ** n * (1 + n / 7)))
    return found


def step(policy, count=12):
    (mini_batch,) = policy.prepare(samples(policy, count))
    return policy.update(mini_batch, BETA)


def weights(policy):
    return torch.cat([value.flatten() for _, value in policy.named_weights()])


def reply_logps(policy, micro_batches):
    return [policy.logps(micro.batch)[micro.batch.completion_mask] for micro in micro_batches]


def test_first_step_has_ratio_one_and_no_kl():
    policy = make(policy__updates_per_step=2, policy__micro_batch_tokens=64)
    first, second = policy.prepare(samples(policy))
    metrics = policy.update(first, BETA)
    assert metrics["kl"] == 0.0
    assert metrics["ratio_mean"] == 1.0
    assert metrics["ratio_max"] == 1.0
    metrics = policy.update(second, BETA)
    assert metrics["kl"] > 0.0
    assert metrics["ratio_max"] != 1.0


def test_a_single_update_uses_its_current_logps_as_old_logps():
    policy = make()
    (only,) = policy.prepare(samples(policy))
    assert all(micro.old_logps is None for micro in only.micro_batches)
    assert policy.update(only, BETA)["ratio_max"] == 1.0


def test_old_logps_may_be_the_rollout_engines():
    policy = make(policy__old_logps="rollout")
    (only,) = policy.prepare(samples(policy))
    assert all(torch.equal(micro.old_logps, micro.rollout_logps) for micro in only.micro_batches)
    assert policy.update(only, BETA)["ratio_max"] != 1.0


def gradient_of(policy, mini_batch):
    """The gradient of one step, all parameters in one row."""
    found = []
    policy._engine.optimizer.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    )
    policy.update(mini_batch, BETA)
    return found[0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_split_into_micro_batches_does_not_change_the_gradient(aggregation, packing):
    gradients = []
    for budget, packed in ((64, packing), (4096, False)):
        policy = make(policy__micro_batch_tokens=budget, objective__aggregation=aggregation, policy__packing=packed)
        (mini_batch,) = policy.prepare(samples(policy))
        assert (len(mini_batch.micro_batches) > 1) == (budget == 64)
        gradients.append(gradient_of(policy, mini_batch))
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_replies_left_out_do_not_change_the_step_of_the_others(aggregation):
    options = {"policy__micro_batch_tokens": 64, "objective__aggregation": aggregation}
    policy, other = make(**options), make(**options)
    data = samples(policy)
    marked = [replace(sample, is_left_out=row % 3 == 0) for row, sample in enumerate(data)]
    (mini_batch,) = policy.prepare(marked)
    (others,) = other.prepare([sample for row, sample in enumerate(data) if row % 3])
    assert (mini_batch.num_sequences, mini_batch.num_tokens) == (others.num_sequences, others.num_tokens)
    assert torch.equal(gradient_of(policy, mini_batch), gradient_of(other, others))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_step_without_samples_has_no_gradient(aggregation, packing):
    policy = make(objective__aggregation=aggregation, policy__packing=packing)
    (mini_batch,) = policy.prepare([replace(sample, is_left_out=True) for sample in samples(policy)])
    metrics = policy.update(mini_batch, BETA)
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"]) == (0.0, 0.0, 0.0)
    assert mini_batch.num_tokens == 0


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_a_rollout_correction_weights_replies_by_their_importance_ratio(correction):
    plain = make(kl__beta=0.0)
    (mini_batch,) = plain.prepare(samples(plain, 3))
    ordered = sorted(samples(plain, 3), key=len, reverse=True)
    logps = reply_logps(plain, mini_batch.micro_batches)[0].split([len(sample.reply_ids) for sample in ordered])

    def gradient(shift=0.0, weights=(1, 1, 1), **overrides):
        """The gradient with the engine's log-probs `shift` nats above the trainer's, and advantages times `weights`."""
        data = [
            replace(sample, rollout_logps=(own + shift).tolist(), advantage=sample.advantage * weight)
            for sample, own, weight in zip(ordered, logps, weights, strict=True)
        ]
        policy = make(kl__beta=0.0, **overrides)
        return gradient_of(policy, policy.prepare(data)[0])

    powers = [1 if correction == "token" else len(sample.reply_ids) for sample in ordered]
    for shift, weights in ((math.log(1.5), [1.5**-power for power in powers]), (-math.log(3), [1.25] * 3)):
        corrected = gradient(shift, objective__rollout_correction=correction, objective__rollout_cap=1.25)
        torch.testing.assert_close(corrected, gradient(weights=weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_other_sequences_of_the_batch_do_not_change_logps(packing):
    policy = make(policy__packing=packing)
    (mini_batch,) = policy.prepare(samples(policy, 3))
    (micro,) = mini_batch.micro_batches
    assert (micro.batch.cu_seqlens is not None) == packing
    together = reply_logps(policy, mini_batch.micro_batches)
    alone = []
    for sample in samples(policy, 3):
        alone += reply_logps(policy, policy.prepare([sample])[0].micro_batches)
    in_order = sorted(alone, key=len, reverse=True)
    torch.testing.assert_close(torch.cat(together), torch.cat(in_order), atol=1e-5, rtol=0)


def test_the_reference_stays_frozen_while_the_policy_is_updated():
    policy = make(optimizer__lr=1e-3)
    before = weights(policy)
    (mini_batch,) = policy.prepare(samples(policy))
    policy.update(mini_batch, BETA)
    (again,) = policy.prepare(samples(policy))
    for old, new in zip(mini_batch.micro_batches, again.micro_batches, strict=True):
        assert torch.equal(old.ref_logps, new.ref_logps)
    assert not torch.equal(before, weights(policy))


def test_an_offloaded_reference_has_equal_logps():
    policies = [make(policy__offload_reference=offload) for offload in (False, True)]
    found = [policy.prepare(samples(policy))[0].micro_batches[0].ref_logps for policy in policies]
    assert torch.equal(*found)


def test_replies_become_more_likely_with_positive_advantage_and_less_with_negative():
    policy = make(optimizer__lr=1e-6, optimizer__warmup_steps=0)
    (mini_batch,) = policy.prepare(samples(policy, 2))
    (micro,) = mini_batch.micro_batches
    before = policy.logps(micro.batch).sum(1)
    policy.update(mini_batch, BETA)
    change = policy.logps(micro.batch).sum(1) - before
    assert torch.equal(change > 0, micro.advantages > 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restored_policy_continues_with_equal_bits(tmp_path, stage):
    policy = make(policy__zero_stage=stage)
    step(policy)
    (tmp_path / "held").mkdir()
    policy.save(tmp_path / "held")
    step(policy)
    other = make(policy__zero_stage=stage)
    other.load(tmp_path / "held")
    step(other)
    assert torch.equal(weights(policy), weights(other))
    assert policy.learning_rate == other.learning_rate


def test_learning_rate_warms_up_and_falls_to_its_end():
    policy = make(run__steps=4, optimizer__warmup_steps=2, optimizer__lr=1.0, optimizer__schedule="linear")
    rates = [step(policy, 2)["learning_rate"] for _ in range(4)]
    assert rates == [0.5, 1.0, 1.0, 0.5]


def test_no_reference_is_needed_without_kl():
    policy = make(kl__beta=0.0)
    (mini_batch,) = policy.prepare(samples(policy))
    assert all(micro.ref_logps is None for micro in mini_batch.micro_batches)
    assert policy.update(mini_batch, torch.tensor(0.0))["kl"] == 0.0


def test_gradient_checkpointing_gives_the_same_step():
    found = []
    for checkpointing in (False, True):
        policy = make(policy__gradient_checkpointing=checkpointing)
        step(policy)
        found.append(weights(policy))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizer_states_may_be_offloaded(stage):
    found = []
    for offload in (False, stage > 0):
        policy = make(
            policy__zero_stage=stage,
            policy__offload_optimizer=offload,
            policy__offload_parameters=offload and stage == 3,
        )
        step(policy)
        found.append(weights(policy))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_small_steps_change_float32_parameters_under_bfloat16_products(stage):
    policy = make(
        policy__dtype="bfloat16",
        policy__zero_stage=stage,
        policy__updates_per_step=2,
        optimizer__lr=1e-6,
        optimizer__warmup_steps=0,
    )
    policy.dtype = torch.float32  # so that named_weights does not round them
    before = weights(policy)
    first, second = policy.prepare(samples(policy))
    metrics = policy.update(first, BETA)
    assert metrics["kl"] == 0.0
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    after = weights(policy)
    assert (after != before).float().mean() > 0.5
    assert (after - before).abs().max() < 2e-6
    policy.update(second, BETA)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("poison", ["advantage", "rollout"])
def test_a_non_finite_gradient_changes_no_weight(stage, poison):
    policy = make(policy__zero_stage=stage, policy__micro_batch_tokens=64)
    step(policy)
    before, (mini_batch,) = weights(policy), policy.prepare(samples(policy))
    micro = mini_batch.micro_batches[0]
    if poison == "advantage":
        micro.advantages[0] = float("inf")
    else:
        micro.ref_logps[micro.batch.completion_mask] = float("nan")
    metrics = policy.update(mini_batch, BETA)
    assert metrics["skipped"] == 1.0
    assert torch.equal(before, weights(policy))
    metrics = step(policy)
    assert metrics["skipped"] == 0.0
    assert metrics["grad_norm"] < 100
    assert not torch.equal(before, weights(policy))
    assert torch.isfinite(weights(policy)).all()


@pytest.mark.parametrize("stage", [0, 3])
def test_an_exported_policy_is_the_trained_one(tmp_path, stage):
    policy = make(policy__zero_stage=stage)
    step(policy)
    policy.export(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    named = dict(exported.named_parameters())
    for name, value in policy.named_weights():
        assert torch.equal(named[name], value)
    assert exported.generation_config.eos_token_id == policy.model.generation_config.eos_token_id
    assert exported.dtype == torch.float32


def test_export_is_in_the_dtype_of_the_policy(tmp_path):
    policy = make(policy__dtype="bfloat16")
    policy.export(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


class TestLora:
    def test_only_adapters_learn_and_the_base_is_the_reference(self):
        policy = make(policy__lora_rank=4, optimizer__lr=1e-2, optimizer__warmup_steps=0)
        base = copy.deepcopy({n: p for n, p in policy.model.named_parameters() if "lora_" not in n})
        assert step(policy)["kl"] == 0.0
        assert step(policy)["kl"] > 0.0
        for name, value in policy.model.named_parameters():
            assert ("lora_" in name) == value.requires_grad
            if "lora_" not in name:
                assert torch.equal(base[name], value)

    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_adapters_are_merged_into_exported_weights(self, tmp_path, stage):
        policy = make(policy__lora_rank=4, policy__zero_stage=stage, optimizer__lr=1e-2, optimizer__warmup_steps=0)
        step(policy)
        policy.export(tmp_path)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path)
        plain = make(kl__beta=0.0)
        missing, unexpected = plain.model.load_state_dict(exported.state_dict(), strict=False)
        assert (missing, unexpected) == ([], [])
        (mini_batch,) = policy.prepare(samples(policy))
        with_adapters = reply_logps(policy, mini_batch.micro_batches)
        torch.testing.assert_close(with_adapters, reply_logps(plain, mini_batch.micro_batches), atol=1e-4, rtol=0)
        reference = [micro.ref_logps[micro.batch.completion_mask] for micro in mini_batch.micro_batches]
        assert (torch.cat(with_adapters) - torch.cat(reference)).abs().max() > 1e-2

    def test_a_restored_policy_continues_with_equal_bits(self, tmp_path):
        policy, other = make(policy__lora_rank=4, policy__zero_stage=2), make(policy__lora_rank=4, policy__zero_stage=2)
        step(policy)
        policy.save(tmp_path)
        step(policy)
        other.load(tmp_path)
        step(other)
        assert torch.equal(weights(policy), weights(other))

    def test_adapters_are_those_of_the_seed(self):
        before = torch.get_rng_state()
        one, again = make(policy__lora_rank=4), make(policy__lora_rank=4)
        other = make(policy__lora_rank=4, run__seed=1)
        assert torch.equal(torch.get_rng_state(), before), "a library that draws random numbers does not notice"
        found = [
            torch.cat([p.flatten() for n, p in policy.model.named_parameters() if "lora_A" in n])
            for policy in (one, again, other)
        ]
        assert torch.equal(found[0], found[1])
        assert (found[0] != found[2]).float().mean() > 0.9
        assert 0 < found[0].std() < 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_without_a_penalty_replies_of_advantage_0_are_left_out_and_change_nothing(aggregation, packing, monkeypatch):
    gradients, metrics, positions = [], [], []
    for skips in (True, False):
        policy = make(kl__beta=0.0, objective__aggregation=aggregation, policy__packing=packing)
        assert policy._skips_zero_advantages
        monkeypatch.setattr(DeepSpeedPolicy, "_skips_zero_advantages", skips)
        data = [replace(s, advantage=0.0) if n % 3 else s for n, s in enumerate(samples(policy))]
        (mini_batch,) = policy.prepare(data)
        monkeypatch.undo()
        positions.append(sum(mini_batch.lengths))
        assert mini_batch.num_sequences == len(data)
        gradients.append(gradient_of(policy, mini_batch))
        metrics.append(policy.update(mini_batch, BETA))
    assert positions[0] < positions[1] / 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-5)
    assert metrics[0]["ratio_mean"] == 1.0  # of the tokens trained on


def test_a_penalty_or_a_bonus_needs_every_reply():
    assert not make()._skips_zero_advantages
    assert not make(kl__beta=0.0, objective__entropy_bonus=0.01)._skips_zero_advantages


def test_a_gradient_tolerance_changes_the_gradient_by_less_and_is_logged():
    policy, exact = make(policy__gradient_tolerance=1e-2), make()
    (mini_batch,), (same,) = policy.prepare(samples(policy)), exact.prepare(samples(exact))
    found, truth = gradient_of(policy, mini_batch), gradient_of(exact, same)
    assert (found - truth).norm() <= 5e-2 * truth.norm()
    metrics, of_exact = policy.update(mini_batch, BETA), exact.update(same, BETA)
    assert metrics["loss"] == of_exact["loss"]
    assert 0 <= metrics["gradient_error_bound"] <= 1e-2
    assert 0 < metrics["kept_columns"] <= 1
    assert metrics.keys() - of_exact.keys() == {"gradient_error_bound", "kept_columns"}
