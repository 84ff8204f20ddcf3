"""The language model: logits computed from its hidden states equal those of the model itself."""

import copy

import pytest
import torch

from expo.errors import ConfigError
from expo.learner.batch import Batch
from expo.learner.model import PolicyModule, head_logits, hidden_states, logit_softcap
from expo_kernels import Objective


def test_logits_are_the_models_own(ledger_model):
    model, tokenizer = ledger_model
    ids = torch.tensor([tokenizer("3+8-2+7=")["input_ids"]])
    batch = Batch(ids, ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        found = head_logits(model, hidden_states(model, batch, torch.float32)[:, -1], torch.float32)
        narrow = hidden_states(model, batch, torch.bfloat16)
    torch.testing.assert_close(found, expected)
    rounded = head_logits(model, narrow[:, -1], torch.bfloat16)
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, atol=0.3, rtol=0.05)


def test_a_softcap_is_applied_and_a_logit_scale_is_refused(ledger_model):
    model = copy.deepcopy(ledger_model[0])
    hidden = torch.randn(2, model.config.hidden_size)
    assert logit_softcap(model) is None
    plain = head_logits(model, hidden, torch.float32)
    model.config.final_logit_softcapping = 3.0
    assert logit_softcap(model) == 3.0
    torch.testing.assert_close(head_logits(model, hidden, torch.float32), 3.0 * torch.tanh(plain / 3.0))
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="logit_scale"):
        logit_softcap(model)


def test_the_gradient_of_a_bfloat16_policys_head_is_never_rounded_to_bfloat16(ledger_model):
    model, tokenizer = copy.deepcopy(ledger_model[0]), ledger_model[1]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied: this gradient alone
    ids = torch.tensor([tokenizer("3+8-2+7=")["input_ids"]])
    batch = Batch(ids, ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool))
    module = PolicyModule(model, Objective(), torch.bfloat16, None)
    loss, _, logps = module(batch, advantages=torch.ones(1), beta=0.0)
    loss.backward()
    gradient = model.lm_head.weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient != gradient.bfloat16()).float().mean() > 0.9
    # the loss and the log-probs of the old policy use the same rounded weight
    with torch.no_grad():
        assert torch.equal(module(batch), logps)
