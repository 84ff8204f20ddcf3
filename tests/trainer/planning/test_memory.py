"""The memory estimate: each part against numbers worked by hand, and activations against what autograd saves."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from expo.config import RunConfig
from expo.learner.flops import ModelShape
from expo.learner.model import run_transformer
from expo.planning.memory import RUNTIME_BYTES, Footprint

# V 1000, H 64, I 160, 2 layers, Q 96, K 48: 64,000 + 2 * layer + 64 + 64,000
SHAPE = ModelShape(1000, 64, 160, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24, is_tied=False)
LAYER = 2 * 64 * 96 + 2 * 64 * 48 + 3 * 64 * 160 + 2 * 64
PARAMETERS = 128_000 + 2 * LAYER + 64


def footprint(num_ranks=4, shape=SHAPE, **fields):
    """A run of 32 replies a step, 16 an update, of at most 20 tokens; fields are section__field."""
    values = {
        "model": {"path": "m"},
        "data": {"train": "t", "max_prompt_tokens": 8},
        "rollout": {"questions_per_step": 4, "group_size": 8, "max_new_tokens": 12},
        "policy": {"micro_batch_tokens": 40, "updates_per_step": 2},
    }
    for name, value in fields.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return Footprint(RunConfig.model_validate(values), shape, num_ranks)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_shards_what_its_stage_says(stage, dtype):
    run = footprint(policy__zero_stage=stage, policy__dtype=dtype)
    assert run.parameter_bytes() == 4 * PARAMETERS / (4 if stage == 3 else 1)
    assert run.reference_bytes() == run.parameter_bytes()
    assert run.gradient_bytes() == 4 * PARAMETERS / (4 if stage >= 2 else 1)
    # two moments, and a copy of the parameters except where DeepSpeed leaves AdamW alone
    assert run.optimizer_bytes() == (12 if stage else 8) * PARAMETERS / (4 if stage else 1)


def test_lora_trains_only_adapters_and_needs_no_reference():
    run = footprint(policy__lora_rank=8, policy__zero_stage=2)
    adapters = 2 * 8 * (160 + 112 + 112 + 160 + 3 * 224)
    assert run.optimizer_bytes() == 12 * adapters / 4
    assert run.gradient_bytes() == 4 * adapters / 4
    assert run.parameter_bytes() == 4 * (PARAMETERS + adapters)
    assert run.reference_bytes() == 0
    assert run.checkpoint_bytes() == 4 * (PARAMETERS + adapters) + 12 * adapters
    assert run.export_bytes() == 2 * PARAMETERS


def test_vllm_holds_an_adapter_of_the_rank_that_it_allocates_beside_its_share_of_the_weights():
    adapter = {"rollout__engine": "vllm", "policy__lora_rank": 12, "vllm__tensor_parallel": 2}
    assert footprint(**adapter).engine_weight_bytes() == 2 * PARAMETERS / 2
    allocated = 2 * 16 * (160 + 112 + 112 + 160 + 3 * 224)
    assert footprint(**adapter, vllm__lora="adapter").engine_weight_bytes() == 2 * (PARAMETERS / 2 + allocated)


def test_no_reference_without_kl():
    assert footprint(kl__beta=0).reference_bytes() == 0


def test_a_micro_batch_is_no_larger_than_the_tokens_of_a_rank():
    assert footprint().micro_batch_tokens() == 40
    # 16 replies of 20 tokens over 4 ranks
    assert footprint(policy__micro_batch_tokens=4000).micro_batch_tokens() == 80


def test_the_loss_holds_one_chunk_hidden_states_and_gradients():
    # rows of 1008 float32 for V = 1000; hidden states; gradients of hidden states and head, each in b and in float32
    run = footprint(policy__dtype="bfloat16")
    assert run.logps_bytes() == 40 * 1008 * 4 + 40 * 64 * 2
    assert run.loss_bytes() == 40 * 1008 * 4 + 40 * 64 * (2 + 2 + 4) + 64_000 * (2 + 4)
    frozen = footprint(policy__dtype="bfloat16", policy__lora_rank=4)
    assert frozen.loss_bytes() == 40 * 1008 * 4 + 40 * 64 * (2 + 2 + 4)
    # a budget of 16 KiB holds 4 rows
    assert footprint(policy__logits_budget_mb=1 / 64).loss_bytes() == run.loss_bytes() - 36 * 1008 * 4


def test_buckets_are_deepspeeds():
    assert footprint(num_ranks=1, policy__zero_stage=0).bucket_bytes() == 0
    assert footprint(policy__zero_stage=0).bucket_bytes() == 4 * PARAMETERS
    assert footprint(policy__zero_stage=2).bucket_bytes() == 4 * PARAMETERS
    assert footprint(policy__zero_stage=3).bucket_bytes() == 4 * (PARAMETERS + PARAMETERS)
    assert footprint(num_ranks=1, policy__zero_stage=3).bucket_bytes() == 4 * (PARAMETERS + PARAMETERS)
    large = ModelShape(150_000, 4096, 160, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24, is_tied=False)
    assert footprint(shape=large, policy__zero_stage=2).bucket_bytes() == 4 * 200_000_000


def test_cast_matrices_are_kept_until_the_backward_pass_unless_recomputed():
    matrices = LAYER - 2 * 64
    assert footprint(policy__dtype="float32").cast_bytes() == 0
    assert footprint().cast_bytes() == 2 * (2 * matrices + 64_000)
    assert footprint(policy__gradient_checkpointing=True).cast_bytes() == 2 * (matrices + 64_000)


def saved_by_autograd(config, dtype, attention, shape=(2, 20)):
    """Bytes of all tensors, except parameters, that a forward pass of the layers saves for the backward pass."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.randint(config.vocab_size, shape)
        output = run_transformer(model.train(), getattr(torch, dtype), input_ids=ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_activations_of_a_layer_are_those_that_autograd_saves(family, attention, dtype):
    # as many key-value heads as heads: on a CPU, eager attention keeps copies of the keys for every head
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
    configs = [family(**sizes, vocab_size=101, head_dim=24, num_hidden_layers=layers) for layers in (2, 3)]
    fewer, more = (saved_by_autograd(config, dtype, attention) for config in configs)
    shape = ModelShape.from_config(configs[0])
    run = footprint(shape=shape, policy__dtype=dtype, model__attention=attention)
    narrowed = 2 * shape.layer_matmul_parameters if dtype == "bfloat16" else 0
    assert more - fewer == 40 * run.layer_activation_bytes() + narrowed


def test_checkpointing_keeps_the_layers_inputs_and_one_layer():
    run, recomputing = footprint(), footprint(policy__gradient_checkpointing=True)
    layer = run.layer_activation_bytes()
    gradients = 3 * 160 * 2
    assert run.activation_bytes() == 40 * (2 * layer + gradients)
    assert recomputing.activation_bytes() == 40 * (2 * 64 * 4 + layer + gradients)


def test_sampling_holds_a_key_value_cache_and_logits():
    # 8 replies of 20 tokens per rank; keys and values of 48 in 2 layers, and a second copy of one layer's
    run = footprint(rollout__batch_size=100)
    assert run.sampled_at_once() == 8
    assert run.cache_bytes() == 8 * 20 * 5 * 48 * 2
    assert run.sampling_bytes() == 4 * 8 * 1000 * 4 + 64_000 * (4 + 2)
    assert footprint(rollout__batch_size=3).cache_bytes() == 3 * 20 * 5 * 48 * 2
    assert footprint(rollout__batch_size=100, evaluation__sets={"a": "b"}).sampled_at_once() == 100
    assert footprint(policy__dtype="float32").sampling_bytes() == 4 * 8 * 1000 * 4
    assert footprint(policy__zero_stage=3).gathered_bytes() == 2 * PARAMETERS
    assert footprint(policy__zero_stage=2).gathered_bytes() == 0
    assert footprint(num_ranks=1, policy__zero_stage=3).gathered_bytes() == 2 * PARAMETERS


def test_the_peak_is_the_resident_memory_plus_the_largest_phase():
    run = footprint(policy__zero_stage=2)
    always = run.parameter_bytes() + run.gradient_bytes() + run.optimizer_bytes() + run.reference_bytes()
    backward = run.activation_bytes() + run.cast_bytes() + run.loss_bytes() + run.bucket_bytes()
    assert run.peak() == ("backward pass", RUNTIME_BYTES + always + backward)
    assert backward > run.cache_bytes() + run.sampling_bytes()


def test_offloading_moves_bytes_from_the_gpu_to_the_node():
    fields = {"policy__offload_optimizer": True, "policy__offload_parameters": True, "policy__offload_reference": True}
    run, kept = footprint(policy__zero_stage=3, **fields), footprint(policy__zero_stage=3)
    assert [part.num_bytes for part in run.resident()] == [0, 0, 0, 0]
    moved = [part.num_bytes for part in run.cpu_parts(ranks_per_node=2)]
    assert sum(moved) == 2 * sum(part.num_bytes for part in kept.resident())
    assert [part.num_bytes for part in kept.cpu_parts(2)] == [0, 0, 0]
    assert "reference log-probs" in run.phases()


def test_loading_reads_float32_on_every_rank_until_stage_3():
    assert footprint(policy__zero_stage=2).loading_bytes(ranks_per_node=4) == 4 * 4 * PARAMETERS
    assert footprint(policy__zero_stage=3).loading_bytes(ranks_per_node=4) == 4 * PARAMETERS


def test_a_checkpoint_holds_parameters_and_float32_states():
    assert footprint(policy__zero_stage=0).checkpoint_bytes() == 12 * PARAMETERS
    assert footprint(policy__zero_stage=2).checkpoint_bytes() == 16 * PARAMETERS
    # at stage 3 the optimizer states hold all parameters but the frozen ones
    assert footprint(policy__zero_stage=3).checkpoint_bytes() == 12 * PARAMETERS
    frozen = footprint(policy__zero_stage=3, policy__lora_rank=8)
    assert frozen.checkpoint_bytes() == 4 * PARAMETERS + 12 * frozen.trained_parameters
