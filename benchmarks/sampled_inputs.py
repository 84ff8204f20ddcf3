"""Inputs of the loss from a real language model: the hidden states of replies that it samples, and its output head.

The probabilities of a random head have no tail like a language model's, so that random inputs say nothing about
`gradient_tolerance`. `make smollm2` writes the model, SmolLM2-135M-Instruct (H = 576, V = 49,152). It answers
arithmetic questions, with fixed seeds; the samples are stored beside it.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.inputs import LOG_RATIO_STD, Inputs, chosen_logps
from benchmarks.shapes import Case

MODEL = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"
MOST_TERM, SEED = 99, 0


def sampled_inputs(case: Case, device: torch.device) -> Inputs:
    """The tensors of a call on the first tokens of replies sampled at the case's temperature, by which the hidden
    states are divided, so that contenders need not know it.

    Raises: FileNotFoundError without the model; ValueError if the replies have too few tokens.
    """
    assert case.temperature is not None
    num_sequences, length = case.shape.num_sequences, case.shape.length
    made = _samples(case.temperature, num_sequences, length)
    hidden, ids, mask = made["hidden"], made["ids"], made["mask"]
    # two thirds of the positions
    num_tokens = 2 * mask.numel() // 3
    # the first positions of all sequences, because a sequence without a token has no mean
    mask &= num_tokens >= mask.T.flatten().cumsum(0).view_as(mask.T).T
    if mask.sum() < num_tokens:
        raise ValueError(f"the replies have {int(mask.sum()):,} tokens, expected {num_tokens:,}; sample more replies")
    dtype, weight = getattr(torch, case.dtype), _head()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        logps = torch.stack([chosen_logps(row @ weight.T, chosen) for row, chosen in zip(hidden, ids, strict=True)])
    old_logps, ref_logps = (logps + LOG_RATIO_STD * torch.randn(logps.shape, generator=generator) for _ in range(2))
    return Inputs(
        case=case,
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(not case.frozen_head),
        ids=ids.to(device),
        mask=mask.to(device),
        advantages=torch.randn(num_sequences, generator=generator).to(device),
        old_logps=old_logps.to(device),
        ref_logps=ref_logps.to(device),
    )


def _require_model() -> None:
    if not MODEL.is_dir():
        raise FileNotFoundError(f"{MODEL} does not exist; `make smollm2` writes it")


def _head() -> Tensor:
    """The head [V, H] in float32, which is the embedding too."""
    _require_model()
    return load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"].float()


def _samples(temperature: float, num_sequences: int, length: int) -> dict[str, Tensor]:
    """Hidden states [B, T, H] over the temperature, ids [B, T] and mask [B, T] of sampled replies."""
    _require_model()
    path = MODEL.parent / f"samples-{temperature}-{num_sequences}x{length}.safetensors"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        save_file(_sample(temperature, num_sequences, length), part)
        part.replace(path)
    return load_file(path)


@torch.no_grad()
def _sample(temperature: float, num_sequences: int, length: int) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    messages = [[{"role": "user", "content": question}] for question in _questions(num_sequences)]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    torch.manual_seed(SEED)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    tokens = model.generate(**batch, **sampling, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id)
    start = batch.input_ids.shape[1]
    ids = torch.nn.functional.pad(
        tokens[:, start:], (0, start + length - tokens.shape[1]), value=tokenizer.pad_token_id
    )
    num_ends = (ids == model.generation_config.eos_token_id).cumsum(1)
    mask = torch.nn.functional.pad(num_ends, (1, -1)) == 0  # an end belongs to the reply
    attention = torch.cat([batch.attention_mask, mask.long()], dim=1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = torch.cat([batch.input_ids, ids], dim=1)
    hidden = model.model(inputs, attention_mask=attention, position_ids=positions).last_hidden_state
    return {"hidden": hidden[:, start - 1 : -1] / temperature, "ids": ids.contiguous(), "mask": mask}


def _questions(number: int) -> list[str]:
    generator = torch.Generator().manual_seed(SEED)
    terms = torch.randint(2, MOST_TERM, (number, 3), generator=generator).tolist()
    return [f"What is {first} + {second} * {third}? Think step by step." for first, second, third in terms]
