"""The interface of rollout engines, and the seeds that make their samples reproducible."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from expo.errors import ConfigError
from expo.rollout.weight_samples import WeightDescription
from expo.types import Reply


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled.

    temperature: 0 means greedy decoding. max_new_tokens: most tokens of a reply. top_p: nucleus sampling. With top_p
    below 1 or temperature 0, log-probs are those of the truncated distribution, not the policy's: such replies must not
    be trained on.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, and a seed for each reply to it."""

    prompt_ids: Sequence[int]
    seeds: Sequence[int]


class RolloutEngine(Protocol):
    """Samples replies from the policy's current weights."""

    @property
    def needs_weight_sync(self) -> bool:
        """Whether the engine has a copy of the policy's weights, which `load_weights` must update."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed, in order.

        The same seed and weights give the same reply in any batch, unless the batch's shape changes rounding; tested in
        float32 on a CPU. `on_progress` is called with the number of replies finished since its last call; an exception
        that it raises ends the call.
        """

    @property
    def takes_adapters(self) -> bool:
        """Whether it is an `AdapterEngine`, whose `load_weights` takes LoRA adapters alone."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads the policy's current weights, named as in the model; does nothing if the engine shares the model."""

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies, computed as in sampling, with its caches."""

    def describe_weights(self) -> list[dict[str, WeightDescription]]:
        """The engine's weights by the engine's names, for each process that holds some."""

    def sleep(self) -> None:
        """Allows the engine to free memory until the next `load_weights`; no reply is requested before."""

    def close(self) -> None:
        """Ends the processes that the engine has started."""


@runtime_checkable
class AdapterEngine(RolloutEngine, Protocol):
    """A rollout engine that applies LoRA adapters to base weights of its own."""

    def load_base_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads the weights under the adapters, named as in the model without adapters; called once, before the first
        `load_weights`.
        """


@runtime_checkable
class StagingEngine(RolloutEngine, Protocol):
    """A rollout engine in processes of its own, which samples with earlier weights while the policy learns."""

    def stage_weights(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Stores the policy's current weights for a later `use_weights`; returns their name."""

    def use_weights(self, version: str) -> None:
        """Loads weights that were staged; no reply is requested meanwhile."""


def request_seed(*parts: object) -> int:
    """A 63-bit seed derived from all of `parts`, such as run seed, step, question id, sample number."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def end_ids(model: Any, tokenizer: Any, stop_tokens: Sequence[str] = ()) -> frozenset[int]:
    """The ids of all tokens that end a reply: the tokenizer's end of sequence, those of the model's generation config,
    and `stop_tokens`.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *listed, *stop_ids(tokenizer, stop_tokens)]
    return frozenset(token for token in ids if token is not None)


def stop_ids(tokenizer: Any, stop_tokens: Sequence[str]) -> list[int]:
    """The ids of rollout.stop_tokens. Raises: ConfigError if one of them is not a single token."""
    vocabulary = tokenizer.get_vocab() if stop_tokens else {}
    ids: list[int] = []
    for token in stop_tokens:
        found = [vocabulary[token]] if token in vocabulary else tokenizer.encode(token, add_special_tokens=False)
        if len(found) != 1:
            raise ConfigError(
                f"rollout.stop_tokens has {token!r}, which is {len(found)} tokens for this model's tokenizer; give "
                f"single tokens, such as {tokenizer.eos_token!r}"
            )
        ids += found
    return ids
