"""Named shapes of the loss: N tokens in sequences of T, hidden size H, vocabulary V."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """One call of the loss: N = num_sequences * length tokens."""

    name: str
    num_sequences: int
    length: int
    hidden_size: int
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length


@dataclass(frozen=True)
class Case:
    """One call: a shape, and how the call differs from the float32 loss of all tokens."""

    shape: Shape
    dtype: Literal["float32", "bfloat16"] = "float32"
    active_share: float = 1.0  # share of unmasked tokens
    frozen_head: bool = False
    ratio: Literal["token", "sequence"] = "token"
    temperature: float | None = None  # of the samples of a language model, whose shape this is; None: random inputs

    def __str__(self) -> str:
        marks = [] if self.active_share == 1 else [f"{self.active_share:.0%} active"]
        marks += [] if self.temperature is None else [f"T = {self.temperature}"]
        marks += ["frozen head"] * self.frozen_head + ["ratio per sequence"] * (self.ratio == "sequence")
        return ", ".join([self.shape.name, self.dtype, *marks])


def smollm2(num_tokens: int) -> Shape:
    """SmolLM2-135M-Instruct's head for about `num_tokens` sampled tokens, in sequences with masked ends."""
    return Shape(f"SmolLM2, {num_tokens:,} tokens", 3 * num_tokens // 128, 64, hidden_size=576, vocab_size=49_152)


TINY = Shape("tiny", num_sequences=4, length=16, hidden_size=32, vocab_size=512)

SMALL = Shape("small", num_sequences=4, length=128, hidden_size=512, vocab_size=32_768)
LARGE = Shape("large", num_sequences=8, length=128, hidden_size=1024, vocab_size=65_536)
LONG = Shape("long", num_sequences=8, length=512, hidden_size=256, vocab_size=32_768)
CPU_SHAPES = (SMALL, LARGE, LONG)
WIDE = replace(SMALL, name="small, H = 1,024", hidden_size=1024)

# the heads of Qwen3-8B and Qwen2.5-1.5B
GPU_SHAPES = tuple(
    Shape(f"{name}, {tokens:,} tokens", num_sequences=8, length=tokens // 8, hidden_size=hidden, vocab_size=151_936)
    for name, hidden in (("8B head", 4096), ("1.5B head", 1536))
    for tokens in (2048, 8192, 32_768)
)


def shapes_for(device: str, *, tiny: bool = False) -> tuple[Shape, ...]:
    """The shapes of a table on "cpu" or "cuda"; one tiny shape if `tiny`, for tests."""
    if tiny:
        return (TINY,)
    return GPU_SHAPES if device == "cuda" else CPU_SHAPES


def side_shape(device: str, *, tiny: bool = False) -> Shape:
    """The shape at which other settings are varied."""
    shapes = shapes_for(device, tiny=tiny)
    return shapes[1] if shapes == GPU_SHAPES else shapes[0]


def dtype_for(device: str) -> Literal["float32", "bfloat16"]:
    """The usual training dtype on this kind of device."""
    return "bfloat16" if device == "cuda" else "float32"
