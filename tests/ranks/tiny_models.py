"""Folders of small language models with the embedded tokenizer."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expo import ledger


def save_tiny_model(folder, tied=True):
    """Saves a Qwen3 of two layers with random weights, the same in every call; the folder."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ledger.MODEL_PATH).save_pretrained(folder)
    return folder
