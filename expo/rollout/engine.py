"""What every rollout engine offers, and the seeds that make its samples repeatable."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from expo.rollout.weight_samples import Described
from expo.types import Reply


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn: temperature (0: always the likeliest token), and the most tokens a reply may have.

    top_p: only the likeliest tokens that together have this probability are drawn. Below 1, and at temperature 0, the
    log-probs of replies are those of what was drawn from, not the policy's: such replies are not for training.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and a seed for each reply wanted."""

    prompt_ids: Sequence[int]
    seeds: Sequence[int]


class RolloutEngine(Protocol):
    """Samples replies from the policy's present weights."""

    @property
    def needs_weight_sync(self) -> bool:
        """Whether the weights are a copy that `load_weights` must bring up to date, and not the policy's own."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed; the same seed and weights give the same reply in any batch, where its
        shape does not change rounding: tested in float32 on a CPU.

        `on_progress` is told how many replies have been finished since it was last told; what it raises ends the call.
        """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's present weights, named as in the model; an engine that shares its model needs none."""

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies, by the path that samples, caches included."""

    def describe_weights(self) -> list[dict[str, Described]]:
        """What it holds, by its own names; for each process that holds some."""

    def sleep(self) -> None:
        """No reply is wanted before the next `load_weights`: memory may be given back until then."""

    def close(self) -> None:
        """Ends what the engine has started."""


def request_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all of `parts`, such as run seed, step, question id, sample number."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a reply: the tokenizer's, and those the model's generation config names."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if token is not None)
