"""The shapes of well-known models by their hub id, so that a run can be planned without their files.

Source: the config.json of each model on the hub. The parameter counts that follow from them are those that the hub
shows (tests/trainer/planning/test_models.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoConfig


@dataclass(frozen=True)
class _Sizes:
    """Named as in config.json: the sizes of one model, without what its variants differ in."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None

    def values(self, context: int) -> dict[str, Any]:
        """The fields of config.json."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return {**known, "max_position_embeddings": context}


_qwen2, _llama = partial(_Sizes, "qwen2"), partial(_Sizes, "llama")
_qwen3 = partial(_Sizes, "qwen3", vocab_size=151936, head_dim=128)

# hidden, intermediate, layers, heads, key-value heads, vocabulary
QWEN2 = {
    "0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True),
    "3B": _qwen2(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
    "7B": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "14B": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "32B": _qwen2(5120, 27648, 64, 40, 8, 152064),
}
QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "4B": _qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "8B": _qwen3(4096, 12288, 36, 32, 8),
    "14B": _qwen3(5120, 17408, 40, 40, 8),
    "32B": _qwen3(5120, 25600, 64, 64, 8),
}
LLAMA3 = {
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "3B": _llama(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True),
    "8B": _llama(4096, 14336, 32, 32, 8, 128256),
}
SMOLLM = {
    "135M": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "360M": _llama(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "1.7B": _llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
}
R1_QWEN_SMALL = _qwen2(1536, 8960, 28, 12, 2, 151936)  # the head of the 1.5B model is its own


def _rows() -> Iterator[tuple[str, _Sizes, int]]:
    """Hub id, sizes and context in tokens of every model."""
    for size, sizes in QWEN2.items():
        base = 32768 if size in ("0.5B", "3B") else 131072
        yield f"Qwen/Qwen2.5-{size}", sizes, base
        yield f"Qwen/Qwen2.5-{size}-Instruct", sizes, 32768
        for suffix in ("", "-Instruct"):
            yield f"Qwen/Qwen2.5-Coder-{size}{suffix}", sizes, 32768
            if size in ("1.5B", "7B"):
                yield f"Qwen/Qwen2.5-Math-{size}{suffix}", sizes, 4096
    for size, sizes in QWEN3.items():
        yield f"Qwen/Qwen3-{size}", sizes, 40960
        if size != "32B":
            yield f"Qwen/Qwen3-{size}-Base", sizes, 32768
    for kind in ("Instruct", "Thinking"):
        yield f"Qwen/Qwen3-4B-{kind}-2507", QWEN3["4B"], 262144
    for suffix in ("", "-Instruct"):
        yield f"meta-llama/Meta-Llama-3-8B{suffix}", LLAMA3["8B"], 8192
        for name in ("Llama-3.1-8B", "Meta-Llama-3.1-8B"):
            yield f"meta-llama/{name}{suffix}", LLAMA3["8B"], 131072
        for size in ("1B", "3B"):
            yield f"meta-llama/Llama-3.2-{size}{suffix}", LLAMA3[size], 131072
        for size, sizes in SMOLLM.items():
            yield f"HuggingFaceTB/SmolLM-{size}{suffix}", sizes, 2048
            yield f"HuggingFaceTB/SmolLM2-{size}{suffix}", sizes, 8192
    for size in ("7B", "14B", "32B"):
        yield f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}", QWEN2[size], 131072
    yield "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", R1_QWEN_SMALL, 131072
    yield "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", LLAMA3["8B"], 131072
    yield "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", QWEN3["8B"], 131072


KNOWN = {name: sizes.values(context) for name, sizes, context in _rows()}
"""The fields of config.json that determine shape and context, by hub id."""
_BY_LOWER_CASE = {name.lower(): name for name in KNOWN}


def known_config(hub_id: str) -> Any | None:
    """transformers' configuration of a model of the table, None for any other; upper and lower case are the same."""
    name = _BY_LOWER_CASE.get(hub_id.lower())
    return None if name is None else AutoConfig.for_model(**KNOWN[name])
