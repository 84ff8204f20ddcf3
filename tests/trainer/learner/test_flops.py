"""Parameter counts, FLOPs and peaks against transformers' modules, PyTorch's counter and numbers worked by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from expo.errors import ConfigError
from expo.learner.flops import (
    ModelShape,
    forward_flops,
    generation_flops,
    head_flops,
    layer_flops,
    peak_flops,
    training_flops,
)

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = [
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=16),
    Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    LlamaConfig(**SIZES),
    LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True),
    MistralConfig(**SIZES),
]
# one layer of hidden 2, inner 3, one head of 2: q, k, v, output 4 weights each, gate, up, down 6 each, so 34; V = 5
BY_HAND = ModelShape(5, 2, 3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, is_tied=True)


def built(config, device="meta"):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_parameters_are_those_of_the_real_module(config, is_tied):
    config.tie_word_embeddings = is_tied
    model = built(config)
    shape = ModelShape.from_config(config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layer_parameters == sum(parameter.numel() for parameter in model.model.layers[1].parameters())


def test_lora_adapts_every_linear_map_but_the_head():
    config = Qwen3Config(**SIZES, head_dim=16)
    maps = [module for module in built(config).model.modules() if isinstance(module, torch.nn.Linear)]
    expected = sum(8 * (module.in_features + module.out_features) for module in maps)
    assert ModelShape.from_config(config).lora_parameters(8) == expected
    assert ModelShape.from_config(config).lora_parameters(0) == 0


def test_a_family_that_cannot_be_counted_is_named():
    class Config:
        model_type = "mamba"

    with pytest.raises(ConfigError, match="mamba cannot be counted"):
        ModelShape.from_config(Config())


def test_flops_worked_by_hand():
    # lengths 3 and 1: 4 tokens, contexts 1 + 2 + 3 + 1 = 7; layer 2 * 34 * 4 + 4 * 2 * 7 = 328; head 2 * 10 a token
    assert layer_flops(BY_HAND, 4, 7) == 328
    assert head_flops(BY_HAND, 4) == 80
    assert forward_flops(BY_HAND, 4, 9 + 1) == 328 + 80
    assert forward_flops(BY_HAND, 4, 9 + 1, num_scored=2) == 328 + 40
    # backward is twice the forward; two more forwards; checkpointing repeats the layer except down: 2 * 6 * 4 = 48
    assert training_flops(BY_HAND, [3, 1], False, 0) == 3 * 408
    assert training_flops(BY_HAND, [3, 1], False, 2) == 5 * 408
    assert training_flops(BY_HAND, [3, 1], True, 0, num_scored=2) == 3 * 368 + 328 - 48
    # frozen weights: products 312 + 40 once for their inputs' gradients, attention 56 twice
    assert training_flops(BY_HAND, [3, 1], False, 0, num_scored=2, trains_base=False) == 368 + 312 + 112


def test_generation_flops_worked_by_hand():
    # a prompt of 2, replies of 3 and 1: prefill of 2 tokens (contexts 1 + 2), one head; then 2 at contexts 3 and 4
    reading = 2 * 34 * 2 + 8 * 3 + 20
    decoding = 2 * 34 * 2 + 8 * 7 + 2 * 20
    assert generation_flops(BY_HAND, [2], [3, 1]) == reading + decoding
    assert generation_flops(BY_HAND, [2, 2], [3, 1]) == 2 * reading + decoding
    with pytest.raises(ValueError, match="3 reply_lengths do not divide among 2"):
        generation_flops(BY_HAND, [2, 2], [1, 1, 1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config", [Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=16)], ids=lambda c: c.model_type
)
def test_flops_are_those_that_pytorch_counts(config, checkpointing):
    shape, model, length = ModelShape.from_config(config), built(config, "cpu").train(), 11
    ids = torch.randint(101, (2, length))
    with FlopCounterMode(display=False) as forward:
        model(input_ids=ids, use_cache=False)
    # eager attention multiplies the whole square, of which a causal model needs (L^2 + L) / 2
    unneeded = 2 * shape.num_layers * 4 * shape.query_size * (length * length - length) / 2
    expected = forward_flops(shape, 2 * length, 2 * length * length)
    assert forward.get_total_flops() == expected + unneeded

    if checkpointing:
        model.gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as training:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = training_flops(shape, [length, length], checkpointing, 0)
    assert training.get_total_flops() == expected + unneeded * (4 if checkpointing else 3)


def test_flops_of_frozen_weights_are_those_that_pytorch_counts():
    config = Qwen2Config(**SIZES)
    shape, model, length = ModelShape.from_config(config), built(config, "cpu"), 7
    model.requires_grad_(False)
    embedded = torch.randn(1, length, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    unneeded = shape.num_layers * 4 * shape.query_size * (length * length - length) / 2
    assert counter.get_total_flops() == training_flops(shape, [length], False, 0, trains_base=False) + 3 * unneeded


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA A100X", None),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_the_device_name_of_torch(name, peak):
    assert peak_flops(name) == peak
