"""A rollout engine that takes LoRA adapters alone, as vLLM does with vllm.lora = adapter, and needs no vLLM."""

import torch
from transformers import AutoModelForCausalLM

from expo.rollout.weight_samples import describe
from tests.trainer.rollout.staging_engine import StagingEngine


class AdapterEngine(StagingEngine):
    """Adds the product of each adapter to base weights of its own."""

    takes_adapters = True

    def __init__(self, policy, batch_size=8):
        model = AutoModelForCausalLM.from_config(policy.model.config, dtype=policy.dtype).eval().requires_grad_(False)
        super().__init__(model, policy, batch_size)
        self.base, self.adapters = [], {}

    def load_base_weights(self, weights):
        self.base.append({name: weight.clone() for name, weight in weights})

    def load_weights(self, weights):
        self.adapters = {name: weight.clone() for name, weight in weights}
        merged = dict(self.base[-1])
        for name, down in self.adapters.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                product = self.adapters[f"{layer}.lora_B.weight"].float() @ down.float()
                merged[f"{layer}.weight"] = (merged[f"{layer}.weight"].float() + product).to(self._dtype)
        super().load_weights(merged.items())

    def describe_weights(self):
        return [describe([*self.base[-1].items(), *self.adapters.items()])]


def move(policy, seed, size=0.2):
    """Adds noise to every adapter of the policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
