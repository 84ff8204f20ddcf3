"""The policy: one code path for all log-probs, exact accounting, and a state that continues with equal bits."""

import copy

import pytest
import torch

from expo.config import load_config
from expo.policy import Sample, TorchPolicy


def config(**overrides):
    pairs = [(name.replace("__", "."), value) for name, value in overrides.items()]
    return load_config(None, pairs)


def samples(tokenizer, count=12):
    texts = [("3+8-2+7=", "11,9,\\boxed{16}"), ("1+1=", "\\boxed{2}"), ("4+5-9=", "9,\\boxed{1}")]
    found = []
    for n in range(count):
        prompt, reply = (tokenizer(text)["input_ids"] for text in texts[n % 3])
        reply = [*reply, tokenizer.eos_token_id]
        found.append(Sample(prompt, reply, [-0.5] * len(reply), advantage=(-1.0) ** n * (1 + n / 7)))
    return found


def make(ledger_model, **overrides):
    model, tokenizer = ledger_model
    own = copy.deepcopy(model)
    return TorchPolicy(config(**overrides), own, copy.deepcopy(own), pad_id=0), own, tokenizer


BETA = torch.tensor(0.0131)


def test_first_step_has_ratio_one_and_no_kl(ledger_model):
    policy, _, tokenizer = make(ledger_model, policy__updates_per_step=2, policy__micro_batch_tokens=64)
    first, second = policy.prepare(samples(tokenizer))
    metrics = policy.update(first, BETA)
    assert metrics["kl"] == 0.0
    assert metrics["ratio_mean"] == 1.0
    assert metrics["ratio_max"] == 1.0
    metrics = policy.update(second, BETA)
    assert metrics["kl"] > 0.0
    assert metrics["ratio_max"] != 1.0


def test_old_logps_of_a_single_update_are_its_own(ledger_model):
    policy, _, tokenizer = make(ledger_model)
    (only,) = policy.prepare(samples(tokenizer))
    assert all(micro.old_logps is None for micro in only)
    assert policy.update(only, BETA)["ratio_max"] == 1.0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_gradient(ledger_model, aggregation):
    gradients = []
    for budget in (64, 4096):
        policy, model, tokenizer = make(
            ledger_model, policy__micro_batch_tokens=budget, objective__aggregation=aggregation
        )
        policy._optimizer.register_step_pre_hook(lambda *_, model=model: gradients.append(flat_gradient(model)))
        (mini_batch,) = policy.prepare(samples(tokenizer))
        assert (len(mini_batch) > 1) == (budget == 64)
        policy.update(mini_batch, BETA)
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


def flat_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_padding_does_not_change_logps(ledger_model):
    policy, _, tokenizer = make(ledger_model)
    (mini_batch,) = policy.prepare(samples(tokenizer, 3))
    together = [policy.logps(micro.batch)[micro.batch.completion_mask] for micro in mini_batch]
    alone = []
    for sample in samples(tokenizer, 3):
        ((micro,),) = policy.prepare([sample])
        alone.append(policy.logps(micro.batch)[micro.batch.completion_mask])
    lengths = sorted(alone, key=len, reverse=True)
    torch.testing.assert_close(torch.cat(together), torch.cat(lengths), atol=1e-5, rtol=0)


def test_reference_stays_frozen_while_the_policy_moves(ledger_model):
    policy, model, tokenizer = make(ledger_model, optimizer__lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    (mini_batch,) = policy.prepare(samples(tokenizer))
    policy.update(mini_batch, BETA)
    (again,) = policy.prepare(samples(tokenizer))
    for old, new in zip(mini_batch, again, strict=True):
        assert torch.equal(old.ref_logps, new.ref_logps)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_good_replies_become_likelier_and_bad_ones_rarer(ledger_model):
    policy, _, tokenizer = make(ledger_model, optimizer__lr=1e-6, optimizer__warmup_steps=0)
    (mini_batch,) = policy.prepare(samples(tokenizer, 2))
    (micro,) = mini_batch
    before = policy.logps(micro.batch).sum(1)
    policy.update(mini_batch, BETA)
    change = policy.logps(micro.batch).sum(1) - before
    assert torch.equal(change > 0, micro.advantages > 0)


def test_a_restored_policy_continues_with_equal_bits(ledger_model):
    policy, model, tokenizer = make(ledger_model)
    data = samples(tokenizer)
    policy.update(policy.prepare(data)[0], BETA)
    state = copy.deepcopy(policy.state_dict())
    policy.update(policy.prepare(data)[0], BETA)
    other, restored, _ = make(ledger_model)
    other.load_state_dict(state)
    other.update(other.prepare(data)[0], BETA)
    for left, right in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(left, right)


def test_learning_rate_warms_up_and_falls_to_its_end(ledger_model):
    policy, _, tokenizer = make(
        ledger_model, run__steps=4, optimizer__warmup_steps=2, optimizer__lr=1.0, optimizer__schedule="linear"
    )
    rates = []
    for _ in range(4):
        rates.append(policy.learning_rate)
        policy.update(policy.prepare(samples(tokenizer, 2))[0], BETA)
    assert rates == [0.5, 1.0, 1.0, 0.5]


def test_no_reference_is_needed_without_kl(ledger_model):
    model, tokenizer = ledger_model
    policy = TorchPolicy(config(kl__beta=0.0), copy.deepcopy(model), None, pad_id=0)
    (mini_batch,) = policy.prepare(samples(tokenizer))
    assert all(micro.ref_logps is None for micro in mini_batch)
    assert policy.update(mini_batch, torch.tensor(0.0))["kl"] == 0.0


def test_gradient_checkpointing_gives_the_same_step(ledger_model):
    weights = []
    for checkpointing in (False, True):
        policy, model, tokenizer = make(ledger_model, policy__gradient_checkpointing=checkpointing)
        policy.update(policy.prepare(samples(tokenizer))[0], BETA)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_bfloat16_products_keep_float32_parameters_that_small_steps_move(ledger_model):
    policy, model, tokenizer = make(
        ledger_model,
        policy__dtype="bfloat16",
        policy__updates_per_step=2,
        optimizer__lr=1e-6,
        optimizer__warmup_steps=0,
    )
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    first, second = policy.prepare(samples(tokenizer))
    metrics = policy.update(first, BETA)
    assert metrics["kl"] == 0.0
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert after.dtype == torch.float32
    assert (after != before).float().mean() > 0.5
    assert (after - before).abs().max() < 2e-6
    policy.update(second, BETA)
