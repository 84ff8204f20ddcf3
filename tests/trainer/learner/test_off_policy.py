"""Updates on replies that older weights sampled: the gradient against float64."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.trainer.learner.test_policy import BETA, gradient_of, make, reply_logps, samples

pytestmark = pytest.mark.medium


def oracle_gradient(policy, data, old_weights, reference_weights, weigh, corrects):
    """The gradient of the decoupled objective in float64, by autograd on one reply after the other.

    weigh: the correction of a reply's tokens, of old - rollout; corrects: False if the ratio is to the rollout's
    log-probs.
    """
    num_tokens = sum(len(sample.reply_ids) for sample in data)

    def logps_of(model, sample):
        ids = torch.tensor([[*sample.prompt_ids, *sample.reply_ids]])
        start = len(sample.prompt_ids) - 1
        logits = model(input_ids=ids).logits[0, start:-1].log_softmax(dim=-1)
        return logits.gather(1, ids[0, start + 1 :, None])[:, 0]

    def double(weights):
        model = copy.deepcopy(policy.model).double()
        model.load_state_dict({name: value.double() for name, value in weights.items()}, strict=False)
        return model

    current = double(dict(policy.named_weights()))
    old, reference = double(old_weights), double(reference_weights)
    loss = 0.0
    for sample in data:
        logps = logps_of(current, sample)
        with torch.no_grad():
            old_logps, ref_logps = logps_of(old, sample), logps_of(reference, sample)
        rollout_logps = torch.tensor(sample.rollout_logps, dtype=torch.float64)
        ratio = (logps - (old_logps if corrects else rollout_logps)).exp()
        surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.28) * sample.advantage)
        penalty = (ref_logps - logps).exp() - (ref_logps - logps) - 1
        loss = loss - (weigh(old_logps - rollout_logps) * surrogate - float(BETA) * penalty).sum() / num_tokens
    current.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in current.parameters()])


CORRECTIONS = {
    "token": lambda differences: differences.exp().clamp(max=1.25),
    "sequence": lambda differences: differences.sum().exp().clamp(max=1.25),
    "token_mask": lambda differences: differences.exp() * (differences.exp() <= 1.25),
    "rollout": lambda differences: 1.0,
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("num_updates", [1, 2])
def test_replies_of_older_weights_give_the_gradient_of_the_decoupled_objective(correction, num_updates):
    corrects = correction != "rollout"
    options = {"objective__rollout_correction": correction, "objective__rollout_cap": 1.25}
    options = options if corrects else {"policy__old_logps": "rollout"}
    policy = make(policy__updates_per_step=num_updates, objective__dual_clip=None, objective__clip_high=0.28,
                  optimizer__warmup_steps=1, optimizer__lr=1e-3, optimizer__max_grad_norm=1e9, **options)  # fmt: skip
    reference = {name: value.clone() for name, value in policy.named_weights()}
    with torch.no_grad():  # the policy has moved since it sampled
        for number, parameter in enumerate(policy.model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-2)
    generator, data = torch.Generator().manual_seed(99), samples(policy, 12)
    for row, sample in enumerate(data):
        (mini_batch,) = make().prepare([sample])
        own = reply_logps(policy, mini_batch.micro_batches)[0]
        noise = torch.randn(own.shape, generator=generator) * 0.2
        data[row] = replace(sample, rollout_logps=(own + noise).tolist())
    old = {name: value.clone() for name, value in policy.named_weights()}
    for index, mini_batch in enumerate(policy.prepare(data)):
        part = data[index * 12 // num_updates :][: 12 // num_updates]
        expected = oracle_gradient(policy, part, old, reference, CORRECTIONS[correction], corrects)
        found = gradient_of(policy, mini_batch).double()
        assert (found - expected).norm() <= 1e-4 * expected.norm()
