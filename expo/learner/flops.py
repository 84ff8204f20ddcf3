"""Parameter counts and FLOPs of a language model, and the peak FLOP/s of GPUs.

Source: Kaplan et al., arXiv 2001.08361, section 2.1, and Chowdhery et al. (PaLM), arXiv 2204.02311, appendix B. We
differ twice: attention is counted over the positions that a causal model attends to, half of the square in those texts,
and the head only for the tokens whose log-probs are computed. Letters: L tokens of a sequence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expo.errors import ConfigError

# dense bfloat16 products with float32 accumulation, FLOP/s, from the vendors' data sheets; the first match counts
PEAK_FLOPS = {
    "A100": 312e12,  # NVIDIA A100 data sheet, SXM and PCIe
    "A800": 312e12,  # an A100 with a slower NVLink
    "A40": 149.7e12,  # NVIDIA A40 data sheet
    "A30": 165e12,  # NVIDIA A30 data sheet
    "A10": 125e12,  # NVIDIA A10 data sheet
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, half of the value with sparsity, as for all below
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM: reported as "NVIDIA H100 80GB HBM3"
    "H800": 989e12,
    "H200 NVL": 835e12,  # NVIDIA H200 data sheet
    "H200": 989e12,
    "GH200": 989e12,  # NVIDIA GH200 data sheet
    "H20": 148e12,
    "B200": 2250e12,  # NVIDIA DGX B200 data sheet
    "GB200": 2500e12,  # NVIDIA GB200 NVL72 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "L40": 181e12,  # NVIDIA L40 data sheet
    "L4": 121e12,  # NVIDIA L4 data sheet
    "RTX 4090": 165.2e12,  # NVIDIA Ada GPU architecture white paper, appendix A
    "RTX 3090": 71e12,  # NVIDIA Ampere GA102 white paper, appendix A
    "MI300X": 1307e12,  # AMD Instinct MI300X data sheet
    "MI325X": 1307e12,  # AMD Instinct MI325X data sheet
    "MI250X": 383e12,  # AMD Instinct MI250X data sheet
}


@dataclass(frozen=True)
class _Family:
    """Biases and norms of a transformers model type with gated MLP, RMSNorm and RoPE; None: set by its config."""

    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    has_qk_norm: bool = False


FAMILIES = {
    "llama": _Family(qkv_bias=None, output_bias=None, mlp_bias=None),
    "mistral": _Family(qkv_bias=False, output_bias=False, mlp_bias=False),
    "qwen2": _Family(qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": _Family(qkv_bias=None, output_bias=None, mlp_bias=False, has_qk_norm=True),
}


@dataclass(frozen=True)
class ModelShape:
    """The shape of a dense decoder: grouped-query attention, a gated MLP, RMSNorm, a head without bias."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_tied: bool
    """Whether the head shares the embedding's weight."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """The shape of the model that a transformers configuration describes.

        Raises: ConfigError if its model type is not one of `FAMILIES`.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ConfigError(
                f"parameters and FLOPs of a model of type {config.model_type} cannot be counted; the known types "
                f"are {', '.join(FAMILIES)}. Leave out what needs the count, such as --dry-run"
            )

        def has_bias(family_default: bool | None, name: str) -> bool:
            return bool(getattr(config, name)) if family_default is None else family_default

        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            is_tied=config.tie_word_embeddings,
            has_qkv_bias=has_bias(family.qkv_bias, "attention_bias"),
            has_output_bias=has_bias(family.output_bias, "attention_bias"),
            has_mlp_bias=has_bias(family.mlp_bias, "mlp_bias"),
            has_qk_norm=family.has_qk_norm,
        )

    @property
    def query_size(self) -> int:
        """Elements of one token's queries, over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys in one layer, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's linear maps: q, k, v, output, gate, up, down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            (hidden, self.query_size),
            (hidden, self.kv_size),
            (hidden, self.kv_size),
            (self.query_size, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of one layer's linear maps, without biases."""
        return sum(inputs * outputs for inputs, outputs in self.layer_products)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer."""
        biases = (
            self.has_qkv_bias * (self.query_size + 2 * self.kv_size)
            + self.has_output_bias * self.hidden_size
            + self.has_mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        )
        norms = 2 * self.hidden_size + self.has_qk_norm * 2 * self.head_dim
        return self.layer_matmul_parameters + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """V * H, the parameters of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the head; 0 if it is tied."""
        return 0 if self.is_tied else self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters: embedding, layers, last norm, head."""
        layers = self.num_layers * self.layer_parameters
        return self.embedding_parameters + layers + self.hidden_size + self.head_parameters

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear map except the head: rank * (inputs + outputs) each."""
        return self.num_layers * sum(rank * (inputs + outputs) for inputs, outputs in self.layer_products)


def layer_flops(shape: ModelShape, num_tokens: int, sum_of_contexts: float) -> float:
    """FLOPs of one forward pass through the layers: 2 for each weight and token, and attention.

    Attention: each query multiplies the keys and values of its context, 4 * heads * head_dim FLOPs a position.
    """
    products = 2 * shape.layer_matmul_parameters * num_tokens
    return shape.num_layers * (products + 4 * shape.query_size * sum_of_contexts)


def head_flops(shape: ModelShape, num_tokens: int) -> float:
    """FLOPs of the logits of `num_tokens`: 2 * H * V each."""
    return 2.0 * shape.embedding_parameters * num_tokens


def forward_flops(
    shape: ModelShape, num_tokens: int, sum_of_squared_lengths: float, num_scored: int | None = None
) -> float:
    """FLOPs of one forward pass.

    Args:
        shape: of the model.
        num_tokens: of all sequences, without padding.
        sum_of_squared_lengths: over the sequences. Position t attends to t + 1 positions, so the contexts of a
            sequence of L tokens sum to (L^2 + L) / 2.
        num_scored: tokens whose logits are computed; None: all of them.
    """
    contexts = (sum_of_squared_lengths + num_tokens) / 2
    scored = num_tokens if num_scored is None else num_scored
    return layer_flops(shape, num_tokens, contexts) + head_flops(shape, scored)


def training_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    gradient_checkpointing: bool,
    forward_only_passes: int,
    *,
    num_scored: int | None = None,
    trains_base: bool = True,
) -> float:
    """FLOPs of one update on sequences of these lengths (prompt and reply).

    A backward pass costs two forward passes: one for the gradients of the inputs, one for those of the weights. With
    gradient checkpointing the layers run forward once more, except for their last product, where PyTorch stops early.
    MFU (model FLOPs utilisation) uses `gradient_checkpointing=False`; HFU, that of the hardware, the actual value.

    Args:
        shape: of the model.
        lengths: tokens of each sequence.
        gradient_checkpointing: whether layers are recomputed.
        forward_only_passes: passes for old and reference log-probs.
        num_scored: reply tokens, the only ones whose logits are computed; None: all tokens.
        trains_base: False with LoRA, whose frozen weights have no gradients; the FLOPs of the adapters, about 1 % of
            the model's, are not counted.
    """
    num_tokens = sum(lengths)
    contexts = (sum(length * length for length in lengths) + num_tokens) / 2
    layers = layer_flops(shape, num_tokens, contexts)
    attention = layers - layer_flops(shape, num_tokens, 0)
    head = head_flops(shape, num_tokens if num_scored is None else num_scored)
    forward = layers + head
    backward = 2 * forward if trains_base else forward + attention
    recomputed = 0.0
    if gradient_checkpointing:
        recomputed = layers - 2.0 * shape.num_layers * shape.intermediate_size * shape.hidden_size * num_tokens
    return forward * (1 + forward_only_passes) + backward + recomputed


def generation_flops(shape: ModelShape, prompt_lengths: Sequence[int], reply_lengths: Sequence[int]) -> float:
    """FLOPs of sampling with a key-value cache.

    Each prompt is prefilled once for all its replies; the first token of a reply is sampled from the prompt's logits,
    and the last token is not fed back.

    Args:
        shape: of the model.
        prompt_lengths: tokens of each distinct prompt.
        reply_lengths: tokens of each reply, the same number of replies for every prompt, those of a prompt adjacent.

    Raises: ValueError if the replies do not divide among the prompts.
    """
    if not prompt_lengths or len(reply_lengths) % len(prompt_lengths):
        raise ValueError(
            f"{len(reply_lengths)} reply_lengths do not divide among {len(prompt_lengths)} prompt_lengths; "
            f"give the same number for every prompt"
        )
    group_size = len(reply_lengths) // len(prompt_lengths)
    squares = sum(length * length for length in prompt_lengths)
    reading = forward_flops(shape, sum(prompt_lengths), squares, num_scored=len(prompt_lengths))
    num_read, contexts = 0, 0.0
    for index, length in enumerate(reply_lengths):
        steps = max(length - 1, 0)
        num_read += steps
        contexts += steps * prompt_lengths[index // group_size] + steps * (steps + 1) / 2
    return reading + layer_flops(shape, num_read, contexts) + head_flops(shape, num_read)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU by its name in `torch.cuda.get_device_name()`; None if unknown."""
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"(?<!\w){name}(?!\w)", device_name, flags=re.IGNORECASE):
            return peak
    return None
