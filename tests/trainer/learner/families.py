"""Tiny models of the families that transformers knows, with the vocabulary of the embedded tokenizer.

`FAMILIES` holds the arguments of each family's configuration; docs/models.md shows what becomes of each.
"""

import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expo.ledger import MODEL_PATH

BASE = {
    "vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
DENSE = {**BASE, "num_key_value_heads": 2, "intermediate_size": 48}
HEAD = {**DENSE, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
GPT = {
    "vocab_size": 19, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
STATES = {
    "vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
DELTA = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
LOW_RANK = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip

FAMILIES = {
    "bamba": {**DENSE, **MAMBA, "attn_layer_indices": [1]},
    "bloom": {"vocab_size": 19, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1, "pad_token_id": 0},
    "cohere": DENSE,
    "deepseek_v3": {
        **DENSE, **LOW_RANK, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "falcon": {**BASE, "alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {**HEAD, **MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "falcon_mamba": STATES,
    "gemma": HEAD,
    "gemma2": {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "glm4": HEAD,
    "gpt2": GPT,
    "gpt_neo": {
        **{name: value for name, value in BASE.items() if not name.startswith("num_")}, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
    },
    "gpt_neox": {**BASE, "intermediate_size": 48},
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {**DENSE, "logits_scaling": 2.0},
    "granitemoehybrid": {
        **DENSE, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "jamba": {
        **DENSE, "num_experts": 2, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": {**DENSE, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "llama": DENSE,
    "llama4_text": {**HEAD, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": {
        **HEAD, "num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {**DENSE, "sliding_window": 4},
    "mixtral": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    "mpt": {
        "vocab_size": 19, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "nemotron": DENSE,
    "olmo": DENSE,
    "olmo2": DENSE,
    "olmo3": {**DENSE, "sliding_window": 4},
    "olmoe": {**DENSE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": DENSE,
    "phi3": DENSE,
    "qwen2": DENSE,
    "qwen2_moe": {**DENSE, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": HEAD,
    "qwen3_5_text": {**HEAD, **DELTA},
    "qwen3_moe": {**HEAD, **EXPERTS},
    "qwen3_next": {**HEAD, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        **BASE, "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 8,
        "lru_width": 32, "attention_window_size": 8,
    },
    "rwkv": {
        "vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "intermediate_size": 48, "eos_token_id": 1, "bos_token_id": None,
    },
    "smollm3": DENSE,
    "stablelm": DENSE,
    "starcoder2": {**DENSE, "sliding_window": None},
}  # fmt: skip


def save_model(folder, family="llama", **changes):
    """Writes a tiny model of a family with weights large enough that every part of it shows in its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_PATH / name, folder)
    return model
