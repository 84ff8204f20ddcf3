"""What is checked about a model before it is trained: its context, its token ids, its weights and its computations.

A model that fails a check would train on something else than it says, without an error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expo.errors import ConfigError, first_line
from expo.learner.batch import Batch, collate, pack
from expo.runtime.distributed import Ranks

MOST_NAMED = 3  # tensors in a message
LENGTHS = (3, 7, 5)  # tokens of the sequences that the computations are compared on
# largest relative difference of a hidden state or logit: rounding is below a hundredth of each; a hidden state that
# saw another sequence is off by a tenth and more (measured on the families of tests/trainer/learner/test_families.py)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def context_length(model_config: Any) -> int | None:
    """Tokens of the longest sequence that the model's positions allow; None if it states no limit."""
    config = model_config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions")]
    stated = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    if not stated:
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    scaled = int(original * factor) if original and factor else 0  # YaRN's kind
    return max(*stated, scaled)


def check_context(model_config: Any, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises: ConfigError if a prompt with its reply may be longer than the model's context."""
    limit, needed = context_length(model_config), max_prompt_tokens + max_new_tokens
    if limit is not None and needed > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {max_prompt_tokens} + {max_new_tokens} = {needed} "
            f"tokens are more than the model's context of {limit} (max_position_embeddings); lower one of the two"
        )


def check_token_ids(model_config: Any, tokenizer: Any, prompts: Iterable[Sequence[int]]) -> None:
    """Raises: ConfigError if a prompt, or the tokenizer's end of sequence, has an id that the model does not have."""
    num_ids = getattr(model_config.get_text_config(), "vocab_size", None)
    largest = max((max(ids, default=0) for ids in prompts), default=0)
    largest = max(largest, tokenizer.eos_token_id or 0)
    if num_ids is not None and largest >= num_ids:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and gives the id {largest}, but the model's vocabulary has "
            f"{num_ids} (vocab_size): they do not belong together; give the model's own tokenizer"
        )


# --- weights


def check_complete(path: str, loading_info: Mapping[str, Any]) -> None:
    """Checks what transformers reports about loading: it draws missing and misshapen tensors at random.

    Raises: ConfigError, which names the tensors.
    """
    missing = sorted(loading_info.get("missing_keys", ()))
    if missing:
        raise ConfigError(
            f"model.path = {path} lacks {len(missing)} tensors of its architecture: {_named(missing)}; complete the "
            f"weights, or correct config.json"
        )
    mismatched = sorted(str(entry[0]) for entry in loading_info.get("mismatched_keys", ()))
    if mismatched:
        raise ConfigError(
            f"model.path = {path} has {len(mismatched)} tensors of other shapes than config.json says: "
            f"{_named(mismatched)}; correct one of the two"
        )


def check_finite(path: str, model: Any) -> None:
    """Raises: ConfigError, which names the tensors, if weights are NaN or infinite; of ZeRO 3, those of this rank."""
    bad = [
        name
        for name, value in model.named_parameters()
        if not torch.isfinite(getattr(value, "ds_tensor", value).detach()).all()
    ]
    if bad:
        raise ConfigError(
            f"model.path = {path} has NaN or infinite weights in {len(bad)} tensors: {_named(bad)}; download it again, "
            f"or choose another checkpoint"
        )


def check_same_weights(path: str, model: Any, ranks: Ranks) -> None:
    """Raises: ConfigError, on every rank, that names the rank and the tensor that differ; for unsharded weights.

    DeepSpeed gives every rank the policy of rank 0, but the reference policy stays what each rank has loaded.
    """
    if ranks.size == 1:
        return
    values = dict(model.named_parameters())
    # of their bits, so that the sum is exact and the same in any order
    sums = torch.stack([value.detach().view(torch.int32).sum(dtype=torch.int64) for value in values.values()])
    facts = {f"the weights {name}": f"sum {bits}" for name, bits in zip(values, sums.tolist(), strict=True)}
    ranks.require_equal(facts, f"give every rank the same files of model.path = {path}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


# --- computations


def check_logits(
    model: Any, own_logits: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Checks that the logits that the loss computes are the model's own.

    Args:
        model: names its family.
        own_logits: the model's own, of token ids [B, S].
        logits: what the loss computes, in training mode, in which dropout would show.
        dtype: of the matrix products.

    Raises: ConfigError, which names the family, if they differ or the model does not give its hidden states.
    """
    family = model.config.model_type
    ids = torch.tensor([token_ids(model, LENGTHS[1])], device=model.device)
    try:
        with torch.no_grad():
            expected, found = own_logits(ids).float(), logits(ids).float()
    except Exception as error:  # families raise many unrelated types
        raise ConfigError(
            f"models of the family {family} cannot be trained: their hidden states cannot be read "
            f"({type(error).__name__}: {first_line(error)}); choose another model"
        ) from error
    if not _is_close(found, expected, dtype):
        raise ConfigError(
            f"models of the family {family} cannot be trained: the logits of their hidden states and head differ from "
            f"the model's own, by a scale or by random numbers; choose another model"
        )


def check_packing(model: Any, hidden: Callable[[Batch], Tensor], dtype: torch.dtype) -> None:
    """Checks that a model separates packed sequences, by comparing hidden states of packed and padded sequences.

    Args:
        model: names its family.
        hidden: the hidden states of a batch, [B, S, H] or packed [N, H].
        dtype: of the matrix products.

    Raises: ConfigError, which names the family, if they differ.
    """
    sequences = [token_ids(model, length) for length in LENGTHS]
    replies: list[list[int]] = [[] for _ in sequences]
    problem = "its hidden states depend on the sequences packed before"
    try:
        padded = hidden(collate(sequences, replies, sequences[0][0], model.device))
        packed = hidden(pack(sequences, replies, model.device))
        expected = torch.cat([row[:length] for row, length in zip(padded, LENGTHS, strict=True)])
        is_right = _is_close(packed, expected, dtype)
    except Exception as error:  # families raise many unrelated types
        is_right, problem = False, f"{type(error).__name__}: {first_line(error)}"
    if not is_right:
        attention = getattr(model.config, "_attn_implementation", None)
        raise ConfigError(
            f"policy.packing = true does not work for the family {model.config.model_type} with attention {attention} "
            f"({problem}); set --policy.packing=false"
        )


def token_ids(model: Any, count: int) -> list[int]:
    """Token ids spread over the vocabulary, for comparing computations."""
    size = model.config.get_text_config().vocab_size
    return [(2 + 7 * position + count) % size for position in range(count)]


def _is_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether every vector (last axis) differs from the expected one by little, relative to its length."""
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).norm(dim=-1)
    return bool((difference <= TOLERANCE[dtype] * expected.float().norm(dim=-1).clamp(min=1e-6)).all())
