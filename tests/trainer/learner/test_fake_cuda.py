"""One step of the algorithm on CUDA tensors, without a GPU: the host reads the device once per update.

DeepSpeed's engine needs a device, so a plain one stands in for it; the model, the loss and the optimizer are the run's.
"""

import copy

import pytest
import torch

from expo.config import load_config
from expo.learner import policy as policy_module
from expo.learner.policy import DeepSpeedPolicy
from expo.runtime.distributed import Ranks
from expo.types import Sample
from expo_kernels import CurriculumTable, akl_beta
from tests.kernels.fake_cuda import HostWaitError, MixedDevicesError, backward, fake_cuda

pytestmark = pytest.mark.medium

CUDA = torch.device("cuda", 0)


class PlainEngine:
    """What `DeepSpeedPolicy` uses of DeepSpeed's engine, on one rank without ZeRO."""

    def __init__(self, module, optimizer, section, max_grad_norm):
        self.module, self.optimizer = module, optimizer

    def __call__(self, *args, **options):
        return self.module(*args, **options)

    def set_gradient_accumulation_boundary(self, is_last): ...

    def backward(self, loss, scale_wrt_gas):
        backward(loss)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return 0.0

    def was_step_applied(self):
        return True


@pytest.fixture
def make_policy(monkeypatch, ledger_model):
    """A function that makes a policy of the embedded model's first layer; call it inside `fake_cuda()`."""

    def load_model(config, device):
        model, tokenizer = copy.deepcopy(ledger_model[0]), ledger_model[1]
        del model.base_model.layers[1:]
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            return model.to(device), tokenizer
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    monkeypatch.setattr(policy_module, "load_model", load_model)
    monkeypatch.setattr(policy_module, "start_engine", PlainEngine)
    # the checks of a start read values, which these tensors do not have
    for check in ("check_finite", "require_own_logits", "check_packing"):
        monkeypatch.setattr(policy_module, check, lambda *_: None)

    def make(**overrides):
        pairs = {"policy.zero_stage": 0, "policy.micro_batch_tokens": 64, "policy.updates_per_step": 2, **overrides}
        return DeepSpeedPolicy(load_config(None, [*pairs.items()]), Ranks(CUDA, 0, 1))

    return make


def samples(policy, count=12):
    prompt, reply = (policy.tokenizer(text)["input_ids"] for text in ("3+8-2+7=", "11,9,\\boxed{16}"))
    return [Sample(prompt, reply, [-0.5] * len(reply), advantage=(-1.0) ** n) for n in range(count)]


def step(device, policy, beta_device="cuda"):
    """What one update does on `device`, with the curriculum's update and the KL coefficient of a step."""
    table, ids = CurriculumTable(100, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    rates = torch.zeros(4, device="cuda")
    accuracies = torch.zeros(4, device=beta_device)
    first, _ = policy.prepare(samples(policy))
    assert len(first.micro_batches) == 2
    assert device.calls.waits == []
    with device.strict(most_reads=1) as calls:
        table.update(ids, rates)
        policy.update(first, akl_beta(accuracies))
    return calls


# most ATen calls, and Triton launches, by transformers 5.19 and PyTorch 2.13
@pytest.mark.parametrize(
    ("options", "most_aten", "num_launches"),
    [
        ({}, 1100, 7),
        ({"policy.dtype": "bfloat16", "policy.packing": True}, 1212, 5),
        ({"policy.logits_budget_mb": 0.0014, "objective.ratio": "sequence"}, 1156, 17),
        ({"policy.zero_stage": 2}, 1064, 7),
    ],
)
def test_a_step_reads_the_device_once(make_policy, options, most_aten, num_launches):
    with fake_cuda() as device:
        calls = step(device, make_policy(**options))
    assert calls.reads == 1
    assert calls.waits == []
    assert calls.num_launches == num_launches, dict(calls.launches)
    assert calls.num_aten <= most_aten, dict(calls.aten)


def test_a_coefficient_on_the_cpu_is_not_copied(make_policy):
    with fake_cuda() as device:
        assert step(device, make_policy(), beta_device="cpu").reads == 1


def test_a_read_or_a_cpu_tensor_planted_in_the_update_is_reported(make_policy, monkeypatch):
    def add(sums, loss, metrics, original=policy_module._Sums.add):
        original(sums, loss, metrics)
        plant(loss.detach())

    monkeypatch.setattr(policy_module._Sums, "add", add)
    with fake_cuda() as device:
        policy = make_policy()
        plant = torch.Tensor.item
        with pytest.raises(HostWaitError):
            step(device, policy)
        plant = lambda loss: loss + torch.zeros(1)  # noqa: E731
        with pytest.raises(MixedDevicesError):
            step(device, policy)
