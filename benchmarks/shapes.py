"""Named shapes of the loss: N tokens in sequences of T, hidden size H, vocabulary V, G rollouts per question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One call of the loss: N = num_sequences * length tokens."""

    name: str
    num_sequences: int
    length: int
    hidden_size: int
    vocab_size: int
    group_size: int = 4

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length


CPU_SHAPES = (
    Shape("small", num_sequences=4, length=128, hidden_size=512, vocab_size=32_768),
    Shape("large", num_sequences=8, length=128, hidden_size=1024, vocab_size=65_536),
)
